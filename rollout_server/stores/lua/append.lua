local run = load_run()

local function check_envs()
  for _, group in ipairs(request.groups) do
    if redis.call('EXISTS', key('env:' .. group.env_id)) == 0 then
      refuse('unknown_env', "group '" .. group.group_id .. "' names environment " .. group.env_id
        .. ', which is not registered; POST /v1/envs first')
    end
  end
end

local function check_lengths()
  for _, group in ipairs(request.groups) do
    if run and request.is_strict and run.max_token_len > 0 and group.longest > run.max_token_len then
      refuse('group_format', "group '" .. group.group_id .. "' holds a sequence of " .. group.longest
        .. ' tokens, the trainer takes at most max_token_len=' .. run.max_token_len
        .. "; lower the environment's max_token_length")
    end
  end
end

local function check_room()
  local bytes, queued = 0, number('totals', 'queue_bytes')
  for _, group in ipairs(request.groups) do
    bytes = bytes + group.bytes
  end
  if queued + bytes > request.max_queued_bytes then
    refuse('queue_full', queued .. ' bytes wait for the trainer, the limit is ' .. request.max_queued_bytes
      .. '; try again later')
  end
end

local function check_payloads()
  for _, group in ipairs(request.groups) do
    if redis.call('EXISTS', payload_key(group.payload)) == 0 and redis.call('HEXISTS', key('ids'), group.group_id) == 0 then
      refuse('store_unavailable', "the payload of group '" .. group.group_id .. "' did not reach Redis; send it again")
    end
  end
end

-- Why a group can no longer be trained within the bound; nil when it can.
local function why_not(group, is_on_time)
  if group.run_id and not (run and group.run_id == run.run_id) then
    return 'other_run'
  elseif not group.oldest or not run then
    return nil
  end
  local is_stale = group.oldest < run.next_step - run.max_staleness
  -- A group whose ticket was void has lost its place; it may still find a free one.
  local is_in_time = is_on_time or group.sequences <= room_for(run, numbers('pending'), group.oldest)
  if is_in_time and not is_stale then
    return nil
  elseif run.late_policy == 'requeue' then
    return 'requeue'
  end
  return is_stale and 'stale' or 'late'
end

-- A group that is known: the very same call repeated gets its first answer, anything else is a duplicate.
local function answer_known(group, at)
  local facts = read_ledger(at, redis.call('HGET', key('ledger'), at))
  if facts.payload == group.payload then
    local reason = redis.call('HGET', key('retired'), at)
    return reason and {'retired', reason} or {'accepted'}
  end
  redis.call('UNLINK', payload_key(group.payload))
  add('counters', 'groups_duplicate', 1)
  return {'duplicate'}
end

local function note_env(env_id)
  local name = key('env:' .. env_id)
  if redis.call('EXISTS', name) == 1 then
    redis.call('HSET', name, 'last_seen', now)
    redis.call('HDEL', name, 'lacking_since')
    redis.call('SREM', key('lacking'), env_id)
  end
end

local function append(group)
  local known = redis.call('HGET', key('ids'), group.group_id)
  if known then
    return answer_known(group, known)
  end
  local is_on_time = group.ticket and drop_ticket(group.ticket) ~= nil
  local reason = why_not(group, is_on_time)
  local at = redis.call('HINCRBY', key('totals'), 'last_key', 1)
  local order = group.oldest or (run and math.max(run.policy_version, 0) or 0)
  group.key, group.oldest, group.order = at, group.oldest or -1, order
  redis.call('HSET', key('ids'), group.group_id, at)
  redis.call('HSET', key('ledger'), at, cmsgpack.pack({
    group.group_id, group.env_id, group.sequences, group.tokens, group.bytes, group.oldest, order, group.payload,
  }))
  changed.capacity, changed.queue = true, true
  note_env(group.env_id)
  if reason then
    redis.call('HSET', key('retired'), at, reason)
    redis.call('UNLINK', payload_key(group.payload))
    add('counters', 'retired:' .. reason, 1)
    return {'retired', reason}
  end
  redis.call('PERSIST', payload_key(group.payload))
  redis.call('HSET', key('totals'), 'latest', group.payload)
  add('totals', 'payload_bytes', group.bytes)
  enqueue(group)
  add('counters', 'groups_accepted', 1)
  add('counters', 'env:' .. group.env_id, 1)
  return {'accepted'}
end

return serve(function()
  if request.is_strict then
    need_run()
    check_envs()
  end
  check_lengths()
  check_room()
  check_payloads()
  local results = {}
  for i, group in ipairs(request.groups) do
    results[i] = append(group)
  end
  return results
end)
