local TICKETS_A_CALL = 1000

-- Whoever holds a ticket could not renew it while Redis was down: after a restart the clocks start anew.
local function forgive_a_restart()
  local process = redis.call('INFO', 'server'):match('run_id:(%w+)')
  if redis.call('HGET', key('totals'), 'redis_process') == process then
    return
  end
  local is_restart = redis.call('HSET', key('totals'), 'redis_process', process) == 0
  for _, ticket in ipairs(is_restart and redis.call('ZRANGE', key('tickets'), 0, -1) or {}) do
    redis.call('ZADD', key('tickets'), 'GT', now + request.ttl_ms, ticket)
  end
end

return serve(function()
  forgive_a_restart()
  local late = redis.call('ZRANGEBYSCORE', key('tickets'), '-inf', '(' .. now, 'LIMIT', 0, TICKETS_A_CALL)
  if redis.call('SCARD', key('lacking')) > 0 then
    changed.queue = true -- a batch may have waited long enough for an environment's minimum
  end
  return {
    expired = #void_tickets(late, 'expired'),
    has_more = #late == TICKETS_A_CALL,
    released_bytes = number('totals', 'released_bytes'),
    archive_bytes = tonumber(redis.call('GET', namespace .. ':archive_bytes') or '0'),
  }
end)
