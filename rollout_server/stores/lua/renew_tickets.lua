return serve(function()
  need_env(request.env_id, request.session)
  local alive = {}
  for _, ticket in ipairs(request.tickets) do
    if redis.call('HEXISTS', key('ticket'), ticket) == 1 then
      redis.call('ZADD', key('tickets'), now + request.ttl_ms, ticket)
      alive[#alive + 1] = ticket
    end
  end
  return alive
end)
