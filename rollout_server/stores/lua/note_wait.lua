-- What the batch waits for; and, where it is an environment's minimum, since when.
return serve(function()
  local run = load_run()
  if not run or run.next_step ~= request.step then
    return
  end
  redis.call('HSET', key('run'), 'waits_for', request.waiting_for)
  for env_id = 0, request.is_for_minimum and redis.call('HLEN', key('envs')) - 1 or -1 do
    local env = load_env(env_id)
    if env.minimum > 0 and number('env_queue', env_id .. ':sequences') == 0 and not env.lacking_since then
      redis.call('HSET', key('env:' .. env_id), 'lacking_since', now)
      redis.call('SADD', key('lacking'), env_id)
    end
  end
end)
