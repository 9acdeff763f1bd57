return serve(function()
  redis.call('HSET', key('servers'), request.url, request.server)
  redis.call('HSET', key('server_seen'), request.url, now)
end)
