return serve(function()
  redis.call('HDEL', key('server_seen'), request.url)
  return redis.call('HDEL', key('servers'), request.url) == 1
end)
