-- Stands before every script: where the keys are, refusals, wake-ups, and the counts that decisions need.
--
-- All keys carry the hash tag of the namespace; those of a run also its generation, so that a clean start costs one INCR.
--   generation  number of the current generation         archive    list of earlier generations, oldest first
--   archive_bytes  what the archived generations hold    p:<name>   payload of one group
-- In the keys of a generation, <generation>:<name>:
--   run       hash: the run and its trainer              totals     hash: last_key, last_ticket, latest, queue_*, ...
--   counters  hash: what status shows                    envs       hash: name -> env_id      env:<id>  hash
--   queue     zset by order_version; the member is "key|env|sequences|tokens|oldest version or -1|bytes", key with zeros
--   queued    hash: version -> sequences queued          pending    hash: version -> sequences queued or in flight
--   sizes     hash: sequences -> groups queued           env_queue  hash: <id>:groups, <id>:sequences
--   tickets   zset by deadline (ms)                      ticket     hash: ticket -> "env|sequences|version|serial"
--   flight    hash: version -> groups in flight          waiting, lacking  sets of env_id
--   ids       hash: group_id -> key                      ledger     hash: key -> packed facts, for good
--   steps     hash: key -> step                          retired    hash: key -> reason
--   batches   hash: step -> packed keys                  released   list of "payload|bytes", oldest first
--   servers, server_seen  hashes by URL
local namespace = ARGV[1]
local request = cmsgpack.unpack(ARGV[2])

local function clock_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local now = request.now_ms or clock_ms()
local prefix
local function enter(generation)
  prefix = namespace .. ':' .. generation .. ':'
end
enter(redis.call('GET', KEYS[1]) or '0')

local function key(name)
  return prefix .. name
end

local function payload_key(name)
  return namespace .. ':p:' .. name
end

-- Refusals. As in every store: before the first change.

local function refuse(code, text)
  error({code = code, text = text})
end

-- Wake-ups and events go out once everything is done.

local changed = {capacity = false, queue = false}
local events = {}

local function tell(kind, text)
  events[#events + 1] = cmsgpack.pack({kind, text})
end

local function serve(operation)
  local is_done, answer = pcall(operation)
  if not is_done then
    if type(answer) == 'table' and answer.code then
      return cmsgpack.pack({false, answer.code, answer.text})
    end
    error(answer)
  end
  for name, has_changed in pairs(changed) do
    if has_changed then
      redis.call('PUBLISH', namespace .. ':' .. name, '')
    end
  end
  for _, event in ipairs(events) do
    redis.call('PUBLISH', namespace .. ':events', event)
  end
  return cmsgpack.pack({true, answer})
end

-- Hashes

local function pairs_of(name)
  local flat, found = redis.call('HGETALL', key(name)), {}
  for i = 1, #flat, 2 do
    found[#found + 1] = {flat[i], flat[i + 1]}
  end
  return found
end

local function numbers(name)
  local found = {}
  for _, pair in ipairs(pairs_of(name)) do
    found[tonumber(pair[1])] = tonumber(pair[2])
  end
  return found
end

local function number_pairs(name)
  local found = {}
  for _, pair in ipairs(pairs_of(name)) do
    found[#found + 1] = {tonumber(pair[1]), tonumber(pair[2])}
  end
  return found
end

local function add(name, field, amount)
  redis.call('HINCRBY', key(name), field, amount)
end

local function tally(name, field, amount)
  if redis.call('HINCRBY', key(name), field, amount) == 0 then
    redis.call('HDEL', key(name), field)
  end
end

local function number(name, field)
  return tonumber(redis.call('HGET', key(name), field) or '0')
end

local function many(name, fields)
  local found = {}
  for first = 1, #fields, 1000 do
    local part = redis.call('HMGET', key(name), unpack(fields, first, math.min(first + 999, #fields)))
    for i = 1, #part do
      found[first + i - 1] = part[i]
    end
  end
  return found
end

-- The run and its trainer

local TEXTS = {request = true, run_id = true, run_name = true, late_policy = true, waits_for = true, nack = true}

local function load_run()
  local flat = redis.call('HGETALL', key('run'))
  if #flat == 0 then
    return nil
  end
  local run = {}
  for i = 1, #flat, 2 do
    run[flat[i]] = TEXTS[flat[i]] and flat[i + 1] or tonumber(flat[i + 1])
  end
  return run
end

local function need_run()
  local run = load_run()
  if not run then
    refuse('no_run', 'no trainer has opened a run yet; start atropos-trainer, or POST /v1/run')
  end
  return run
end

local function need_trainer(session)
  local run = need_run()
  if run.session ~= session then
    refuse('fenced', "run '" .. run.run_name .. "' was taken over: session " .. session .. ' is over, ' .. run.session
      .. ' is the trainer now; stop this one')
  end
  redis.call('HSET', key('run'), 'trainer_last_seen', now)
  return run
end

local function run_facts(run)
  return {
    run_name = run.run_name, run_id = run.run_id, session = run.session, policy_version = run.policy_version,
    committed = run.committed, acknowledged = run.acknowledged, request = run.request,
  }
end

local function publish_policy(run, version)
  if version and version > run.policy_version then
    redis.call('HSET', key('run'), 'policy_version', version)
    changed.capacity = true
    tell('policy_published', 'the inference servers run policy version ' .. version)
  end
end

-- Environments

local function load_env(env_id)
  local flat = redis.call('HGETALL', key('env:' .. env_id))
  if #flat == 0 then
    return nil
  end
  local env = {env_id = env_id}
  for i = 1, #flat, 2 do
    env[flat[i]] = flat[i] == 'request' and flat[i + 1] or tonumber(flat[i + 1])
  end
  return env
end

local function need_env(env_id, session)
  local env = load_env(env_id)
  if not env or env.session ~= session or env.is_connected ~= 1 then
    refuse('unknown_env', 'environment ' .. env_id .. ' session ' .. session
      .. ' is not known here; register again with POST /v1/envs')
  end
  redis.call('HSET', key('env:' .. env_id), 'last_seen', now)
  return env
end

local function is_live(env)
  return env.is_connected == 1 and now - env.last_seen <= request.env_timeout_ms
end

-- The staleness bound; see rollout_server/admission.py

local function capacity_until(run, next_step, version)
  return run.batch_size * math.max(0, version + run.max_staleness + 1 - next_step)
end

local function sorted_versions(pending)
  local versions = {}
  for version in pairs(pending) do
    versions[#versions + 1] = version
  end
  table.sort(versions)
  return versions
end

local function overfull_version(run, next_step, pending)
  local held = 0
  for _, version in ipairs(sorted_versions(pending)) do
    held = held + pending[version]
    if pending[version] > 0 and held > capacity_until(run, next_step, version) then
      return version
    end
  end
  return nil
end

-- Sequences of this version that can be trained in time beside what is pending; negative when even that does not fit.
local function room_for(run, pending, version)
  pending[version] = pending[version] or 0
  local held, room = 0, math.huge
  for _, other in ipairs(sorted_versions(pending)) do
    held = held + pending[other]
    local free = capacity_until(run, run.next_step, other) - held
    if other >= version then
      room = math.min(room, free)
    elseif free < 0 then
      return -1
    end
  end
  return room
end

-- Tickets

local function read_ticket(ticket)
  local text = redis.call('HGET', key('ticket'), ticket)
  if not text then
    return nil
  end
  local env_id, sequences, version, serial = text:match('^(%d+)|(%d+)|(%d+)|(%d+)$')
  return {env_id = tonumber(env_id), sequences = tonumber(sequences), version = tonumber(version), serial = tonumber(serial)}
end

local function count_flight(env_id, sequences, version, sign)
  tally('pending', version, sign * sequences)
  tally('flight', version, sign)
  add('totals', 'tickets', sign)
  add('totals', 'in_flight', sign * sequences)
  add('env:' .. env_id, 'tickets', sign)
  add('env:' .. env_id, 'in_flight', sign * sequences)
end

local function hold_ticket(ticket, env_id, sequences, version, deadline)
  local serial = redis.call('HINCRBY', key('totals'), 'last_ticket', 1)
  local text = string.format('%d|%d|%d|%d', env_id, sequences, version, serial)
  redis.call('HSET', key('ticket'), ticket, text)
  redis.call('ZADD', key('tickets'), deadline, ticket)
  count_flight(env_id, sequences, version, 1)
end

local function drop_ticket(ticket)
  local held = read_ticket(ticket)
  if held then
    redis.call('HDEL', key('ticket'), ticket)
    redis.call('ZREM', key('tickets'), ticket)
    count_flight(held.env_id, held.sequences, held.version, -1)
  end
  return held
end

local function void_tickets(tickets, reason)
  local alive = {}
  for _, ticket in ipairs(tickets) do
    if drop_ticket(ticket) then
      alive[#alive + 1] = ticket
    end
  end
  if #alive > 0 then
    add('counters', 'ticket:' .. reason, #alive)
    changed.capacity, changed.queue = true, true
    tell('tickets_voided', #alive .. ' groups in flight were given up: ' .. reason)
  end
  return alive
end

local function tickets_of(env_id)
  local found = {}
  for _, pair in ipairs(pairs_of('ticket')) do
    if tonumber(pair[2]:match('^(%d+)|')) == env_id then
      found[#found + 1] = pair[1]
    end
  end
  return found
end

-- Groups. A group is {key, env_id, sequences, tokens, oldest (-1: unknown), bytes, order}.

local function member_of(group)
  return string.format('%013d|%d|%d|%d|%d|%d', group.key, group.env_id, group.sequences, group.tokens, group.oldest, group.bytes)
end

local function read_member(member, order)
  local at, env_id, sequences, tokens, oldest, bytes = member:match('^(%d+)|(-?%d+)|(%d+)|(%d+)|(-?%d+)|(%d+)$')
  return {
    key = tonumber(at), env_id = tonumber(env_id), sequences = tonumber(sequences), tokens = tonumber(tokens),
    oldest = tonumber(oldest), bytes = tonumber(bytes), order = tonumber(order),
  }
end

-- Facts in the ledger: group_id, env_id, sequences, tokens, bytes, oldest, order, payload name.
local function read_ledger(at, packed)
  local facts = cmsgpack.unpack(packed)
  return {
    key = at, group_id = facts[1], env_id = facts[2], sequences = facts[3], tokens = facts[4], bytes = facts[5],
    oldest = facts[6], order = facts[7], payload = facts[8],
  }
end

local function ledger_of(keys)
  local groups = {}
  for i, packed in ipairs(many('ledger', keys)) do
    groups[i] = read_ledger(keys[i], packed)
  end
  return groups
end

local function count_queued(group, sign)
  add('totals', 'queue_groups', sign)
  add('totals', 'queue_sequences', sign * group.sequences)
  add('totals', 'queue_bytes', sign * group.bytes)
  tally('sizes', group.sequences, sign)
  tally('env_queue', group.env_id .. ':groups', sign)
  tally('env_queue', group.env_id .. ':sequences', sign * group.sequences)
  if group.oldest >= 0 then
    tally('queued', group.oldest, sign * group.sequences)
    tally('pending', group.oldest, sign * group.sequences)
  end
end

local function enqueue(group)
  redis.call('ZADD', key('queue'), group.order, member_of(group))
  count_queued(group, 1)
end

local function dequeue(group)
  redis.call('ZREM', key('queue'), member_of(group))
  count_queued(group, -1)
end

-- Its payload will not be leased again; trim.lua deletes it when there is no room to keep it.
local function release(group)
  redis.call('RPUSH', key('released'), group.payload .. '|' .. group.bytes)
  add('totals', 'released_bytes', group.bytes)
end

local function retire(group, reason)
  redis.call('HSET', key('retired'), group.key, reason)
  redis.call('HDEL', key('steps'), group.key)
  add('counters', 'retired:' .. reason, 1)
  release(group)
end

local function count_trained(group, sign)
  add('counters', 'trained_tokens:' .. group.env_id, sign * group.tokens)
  add('counters', 'trained_sequences:' .. group.env_id, sign * group.sequences)
end

local function batch_keys(step)
  local packed = redis.call('HGET', key('batches'), step)
  return packed and cmsgpack.unpack(packed) or {}
end

local function batch_rows(step)
  local rows = {}
  for i, group in ipairs(ledger_of(batch_keys(step))) do
    rows[i] = {group.group_id, group.payload, group.tokens, group.bytes}
  end
  return rows
end

-- Another run may begin here; this one's keys stay until trim.lua needs the room.
local RECORD_BYTES = 512

local function archive()
  local bytes = number('totals', 'payload_bytes') + RECORD_BYTES * number('totals', 'last_key')
  redis.call('INCRBY', namespace .. ':archive_bytes', bytes)
  redis.call('RPUSH', namespace .. ':archive', redis.call('GET', KEYS[1]) or '0')
  enter(redis.call('INCR', KEYS[1]))
  changed.capacity, changed.queue = true, true
end
