local function ticket_name(index)
  return string.format('%s%04x', request.nonce, index)
end

-- What admission.may_take needs of the environments that compete: nil when nobody else waits.
local function limit_beside_others(run, env)
  local claims = {env}
  for _, member in ipairs(redis.call('SMEMBERS', key('waiting'))) do
    local other = tonumber(member) ~= env.env_id and load_env(tonumber(member))
    if other and is_live(other) then
      claims[#claims + 1] = other
    end
  end
  local is_measured, has_rivals = true, false
  for i, claim in ipairs(claims) do
    claim.sequences = number('counters', 'trained_sequences:' .. claim.env_id)
    claim.tokens = number('counters', 'trained_tokens:' .. claim.env_id)
    is_measured = is_measured and claim.sequences > 0
    has_rivals = has_rivals or (i > 1 and claim.weight > 0)
  end
  if not has_rivals then
    return nil
  end
  local total = 0
  for i, claim in ipairs(claims) do
    claim.share = claim.weight / (is_measured and claim.tokens / claim.sequences or 1)
    total = total + ((i == 1 or claim.weight > 0) and claim.share or 0)
  end
  if env.weight <= 0 then
    return -1
  end
  local capacity = capacity_until(run, run.next_step, run.policy_version)
  return math.max(request.sequences, capacity * env.share / total)
end

-- Groups that may start now.
local function groups_free(run, env)
  if run.policy_version < 0 then
    return 0 -- before the first publication nobody knows what the inference servers run
  end
  local left = math.max(0, run.num_steps - run.next_step) * run.batch_size
  local in_flight = number('totals', 'in_flight')
  local places = left - number('totals', 'queue_sequences') - in_flight
  if places > 0 and places < request.sequences and in_flight == 0 then
    places = request.sequences -- groups may come smaller than promised: the last places are given to one at a time
  end
  local room = math.min(places, room_for(run, numbers('pending'), run.policy_version))
  local limit = limit_beside_others(run, env)
  if limit then
    room = math.min(room, limit - env.in_flight - number('env_queue', env.env_id .. ':sequences'))
  end
  return math.max(0, math.floor(room / request.sequences))
end

return serve(function()
  local run = need_run()
  local env = need_env(request.env_id, request.session)
  local is_finished = run.acknowledged >= run.num_steps
  local granted = 0
  -- A repeated call finds the tickets of the one whose answer was lost.
  while granted < request.count and redis.call('HEXISTS', key('ticket'), ticket_name(granted)) == 1 do
    granted = granted + 1
  end
  if granted < request.count and not is_finished then
    local upto = math.min(request.count, granted + groups_free(run, env))
    for i = granted, upto - 1 do
      hold_ticket(ticket_name(i), request.env_id, request.sequences, run.policy_version, now + request.ttl_ms)
    end
    granted = upto
  end
  if granted < request.count and not is_finished then
    redis.call('SADD', key('waiting'), request.env_id)
  elseif redis.call('SREM', key('waiting'), request.env_id) == 1 then
    changed.capacity = true -- what the others may take depends on who waits
  end
  return {granted = granted, policy_version = run.policy_version, step = run.acknowledged, is_finished = is_finished}
end)
