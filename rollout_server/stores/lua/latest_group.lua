return serve(function()
  return redis.call('HGET', key('totals'), 'latest') or ''
end)
