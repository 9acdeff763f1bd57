return serve(function()
  if redis.call('EXISTS', key('env:' .. request.env_id)) == 0 then
    return false
  end
  redis.call('HSET', key('env:' .. request.env_id), 'last_seen', now)
  return true
end)
