local function check_group_size(run)
  local size, name = request.group_size, request.name
  if run.group_size > 0 and size ~= run.group_size then
    refuse('config', "environment '" .. name .. "' has group_size=" .. size .. ', the run wants ' .. run.group_size
      .. '; set --group_size ' .. run.group_size)
  end
end

return serve(function()
  local run = need_run()
  check_group_size(run)
  local env_id = tonumber(redis.call('HGET', key('envs'), request.name) or redis.call('HLEN', key('envs')))
  local env = load_env(env_id)
  local session = env and env.session + 1 or 1
  void_tickets(tickets_of(env_id), 'env_restarted')
  redis.call('HSET', key('envs'), request.name, env_id)
  redis.call('DEL', key('env:' .. env_id))
  redis.call('HSET', key('env:' .. env_id), 'request', request.request, 'session', session, 'is_connected', 1,
    'weight', request.weight, 'minimum', request.minimum, 'last_seen', now, 'tickets', 0, 'in_flight', 0)
  redis.call('SREM', key('waiting'), env_id)
  redis.call('SREM', key('lacking'), env_id)
  tell('env_joined', 'environment ' .. request.name .. ': id ' .. env_id .. ', session ' .. session)
  return {env_id = env_id, session = session, run = run_facts(run)}
end)
