-- Groups that went stale in the queue; none as long as admission keeps its promise.
local function retire_stale(run)
  local floor, retired = run.next_step - run.max_staleness, 0
  for version in pairs(numbers('queued')) do
    if version < floor then
      for _, member in ipairs(redis.call('ZRANGEBYSCORE', key('queue'), version, version)) do
        local group = read_member(member, version)
        if group.oldest >= 0 then
          dequeue(group)
          retire(ledger_of({group.key})[1], 'stale')
          retired = retired + 1
        end
      end
    end
  end
  if retired > 0 then
    tell('groups_retired', retired .. ' groups went stale in the queue')
  end
end

local function window(batch_size)
  local flat, found = redis.call('ZRANGE', key('queue'), 0, batch_size + request.search_window - 1, 'WITHSCORES'), {}
  for i = 1, #flat, 2 do
    local group = read_member(flat[i], flat[i + 1])
    found[#found + 1] = {group.key, group.env_id, group.sequences, group.tokens, group.oldest, group.order, flat[i]}
  end
  return found
end

local function shares()
  local found = {}
  for env_id = 0, redis.call('HLEN', key('envs')) - 1 do
    local env = load_env(env_id)
    local is_waited_for = is_live(env)
      and (not env.lacking_since or now - env.lacking_since < request.allocation_wait_ms)
    found[#found + 1] = {env_id, env.weight, env.minimum, number('counters', 'trained_tokens:' .. env_id), is_waited_for}
  end
  return found
end

return serve(function()
  local run, step = need_trainer(request.session), request.step
  if step < run.committed or step > run.next_step then
    refuse('step', 'step ' .. step .. ' cannot be leased: steps ' .. run.committed .. ' to ' .. run.next_step
      .. ' can (committed, next to be formed)')
  elseif step < run.next_step then
    redis.call('HDEL', key('run'), 'waits_for')
    return {batch = batch_rows(step)}
  elseif step >= run.num_steps then
    refuse('step', 'step ' .. step .. ' cannot be leased: the run has num_steps=' .. run.num_steps)
  end
  retire_stale(run)
  local queued = number('totals', 'queue_sequences')
  if queued < run.batch_size then
    local text = (run.batch_size - queued) .. ' more sequences for step ' .. step .. ' (' .. queued .. ' of '
      .. run.batch_size .. ' queued, ' .. number('totals', 'tickets') .. ' groups in flight)'
    redis.call('HSET', key('run'), 'waits_for', text)
    return {waiting_for = text}
  end
  return {look = {
    batch_size = run.batch_size, max_staleness = run.max_staleness, is_patient = run.late_policy == 'wait',
    pending = number_pairs('pending'), queued = number_pairs('queued'), flight = number_pairs('flight'),
    window = window(run.batch_size), shares = shares(),
  }}
end)
