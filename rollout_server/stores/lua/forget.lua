-- Payloads of a refused call go at once; those that an earlier attempt of it made permanent stay.
return serve(function()
  for _, name in ipairs(request.payloads) do
    if redis.call('TTL', payload_key(name)) > 0 then
      redis.call('UNLINK', payload_key(name))
    end
  end
end)
