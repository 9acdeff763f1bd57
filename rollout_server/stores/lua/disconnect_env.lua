return serve(function()
  local env = load_env(request.env_id)
  if not env then
    return false
  end
  void_tickets(tickets_of(request.env_id), 'env_left')
  redis.call('SREM', key('waiting'), request.env_id)
  redis.call('HSET', key('env:' .. request.env_id), 'is_connected', 0)
  changed.capacity, changed.queue = true, true
  tell('env_left', 'environment ' .. cjson.decode(env.request).name .. ' said goodbye')
  return true
end)
