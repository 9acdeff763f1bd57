local function envs()
  local found = {}
  for env_id = 0, redis.call('HLEN', key('envs')) - 1 do
    local env = load_env(env_id)
    found[#found + 1] = {
      env_id = env_id, request = env.request, is_connected = env.is_connected == 1, last_seen_ms = now - env.last_seen,
      tickets = env.tickets, queued_groups = number('env_queue', env_id .. ':groups'),
      queued_sequences = number('env_queue', env_id .. ':sequences'),
    }
  end
  return found
end

local function servers()
  local found = {}
  for _, pair in ipairs(pairs_of('servers')) do
    found[#found + 1] = {pair[2], now - number('server_seen', pair[1])}
  end
  return found
end

local function counters()
  local found = {}
  for _, pair in ipairs(pairs_of('counters')) do
    found[#found + 1] = {pair[1], tonumber(pair[2])}
  end
  return found
end

return serve(function()
  local run, sizes = load_run(), {}
  for size in pairs(numbers('sizes')) do
    sizes[#sizes + 1] = size
  end
  return {
    run = run and run_facts(run), next_step = run and run.next_step or 0, waits_for = run and run.waits_for,
    trainer_last_seen_ms = run and now - run.trainer_last_seen,
    queue_groups = number('totals', 'queue_groups'), queue_sequences = number('totals', 'queue_sequences'),
    queue_bytes = number('totals', 'queue_bytes'), tickets = number('totals', 'tickets'),
    in_flight = number('totals', 'in_flight'), sizes = sizes, counters = counters(), envs = envs(), servers = servers(),
  }
end)
