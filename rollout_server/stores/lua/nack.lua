local function groups_from(run, step)
  local groups = {}
  for other = step, run.next_step - 1 do
    for _, group in ipairs(ledger_of(batch_keys(other))) do
      groups[#groups + 1] = group
    end
  end
  return groups
end

local function check_retired(groups)
  local is_there, unknown = {}, {}
  for _, group in ipairs(groups) do
    is_there[group.group_id] = true
  end
  for _, group_id in ipairs(request.retire) do
    if not is_there[group_id] then
      unknown[#unknown + 1] = group_id
    end
  end
  if #unknown > 0 then
    table.sort(unknown)
    refuse('protocol', "retire names '" .. unknown[1] .. "', which is in no batch from step " .. request.step .. ' on')
  end
end

local function dissolve(groups)
  local is_retired, n_retired = {}, 0
  for _, group_id in ipairs(request.retire) do
    is_retired[group_id] = true
  end
  for _, group in ipairs(groups) do
    count_trained(group, -1)
    if is_retired[group.group_id] then
      n_retired = n_retired + 1
      retire(group, 'nack_' .. request.reason)
    else
      redis.call('HDEL', key('steps'), group.key)
      enqueue(group)
    end
  end
  return n_retired
end

return serve(function()
  local run, step = need_trainer(request.session), request.step
  local nonce, requeued, retired = (run.nack or ''):match('^(%w+) (%d+) (%d+)$')
  if nonce == request.nonce then
    return {requeued = tonumber(requeued), retired = tonumber(retired)} -- a repeated call whose first answer was lost
  end
  if step < run.acknowledged or step >= run.next_step then
    refuse('step', 'the batch of step ' .. step .. ' cannot be given back: formed and not acknowledged are steps '
      .. run.acknowledged .. ' to ' .. (run.next_step - 1))
  end
  local groups = groups_from(run, step)
  check_retired(groups)
  local n_retired = dissolve(groups)
  for other = step, run.next_step - 1 do
    redis.call('HDEL', key('batches'), other)
  end
  local n_requeued = #groups - n_retired
  redis.call('HSET', key('run'), 'next_step', step, 'nack', request.nonce .. ' ' .. n_requeued .. ' ' .. n_retired)
  changed.capacity, changed.queue = true, true
  tell('batch_nacked', 'batch of step ' .. step .. ' given back: ' .. request.reason .. '; ' .. n_retired .. ' groups retired')
  return {requeued = n_requeued, retired = n_retired}
end)
