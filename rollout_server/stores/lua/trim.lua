-- Deletes payload that nobody will lease again, beyond what is retained: a bounded piece of work a call.
-- Answers whether there is more to do.
local WORK_A_CALL = 500
local GENERATION_KEYS = {
  'run', 'totals', 'counters', 'envs', 'queue', 'queued', 'pending', 'sizes', 'env_queue', 'tickets', 'ticket', 'flight',
  'waiting', 'lacking', 'ids', 'ledger', 'steps', 'retired', 'batches', 'released', 'servers', 'server_seen',
}
local work = WORK_A_CALL

local function release_committed()
  local run = load_run()
  local step = number('totals', 'released_step')
  while run and step < run.committed and work > 0 do
    local groups = ledger_of(batch_keys(step))
    for _, group in ipairs(groups) do
      release(group)
    end
    redis.call('HDEL', key('batches'), step)
    step, work = step + 1, work - 1 - #groups
    redis.call('HSET', key('totals'), 'released_step', step)
  end
end

local function delete_released()
  local bytes = number('totals', 'released_bytes')
  while bytes > request.retain_bytes and work > 0 do
    local payload, size = redis.call('LPOP', key('released')):match('^(.*)|(%d+)$')
    redis.call('UNLINK', payload_key(payload))
    add('totals', 'released_bytes', -size)
    add('totals', 'payload_bytes', -size)
    bytes, work = bytes - size, work - 1
  end
end

local function delete_generation()
  redis.call('INCRBY', namespace .. ':archive_bytes', -number('totals', 'payload_bytes') - RECORD_BYTES * number('totals', 'last_key'))
  for env_id = 0, redis.call('HLEN', key('envs')) - 1 do
    redis.call('UNLINK', key('env:' .. env_id))
  end
  for _, name in ipairs(GENERATION_KEYS) do
    redis.call('UNLINK', key(name))
  end
  redis.call('LPOP', namespace .. ':archive')
end

local function delete_archived(generation)
  enter(generation)
  local at, last = number('totals', 'swept'), number('totals', 'last_key')
  local keys = {}
  while at < last and #keys < work do
    at = at + 1
    keys[#keys + 1] = at
  end
  for _, group in ipairs(ledger_of(keys)) do
    redis.call('UNLINK', payload_key(group.payload))
  end
  redis.call('HSET', key('totals'), 'swept', at)
  work = work - #keys
  if at == last then
    delete_generation()
  end
end

local function archive_bytes()
  return tonumber(redis.call('GET', namespace .. ':archive_bytes') or '0')
end

return serve(function()
  release_committed()
  delete_released()
  local oldest = redis.call('LINDEX', namespace .. ':archive', 0)
  while oldest and archive_bytes() > request.retain_bytes and work > 0 do
    delete_archived(oldest)
    oldest = redis.call('LINDEX', namespace .. ':archive', 0)
  end
  return work <= 0
end)
