return serve(function()
  local run = load_run()
  if run and run.run_name ~= request.run_name then
    archive()
    run = nil
  end
  local next_step, session
  if not run then
    local start = request.start_step or 0
    next_step, session = start, 1
    redis.call('HSET', key('run'), 'run_id', request.run_id, 'policy_version', -1, 'acknowledged', start, 'committed', start)
    redis.call('HSET', key('totals'), 'released_step', start)
  else
    if request.start_step and request.start_step < run.committed then
      refuse('step', "run '" .. run.run_name .. "' keeps the batches from step " .. run.committed .. ' on; a trainer at step '
        .. request.start_step .. ' cannot resume here: resume from the newest checkpoint, or choose a new run_name')
    end
    if request.batch_size ~= run.batch_size and run.next_step > run.committed then
      refuse('config', "run '" .. run.run_name .. "' has batches of " .. run.batch_size .. ' to replay; batch_size='
        .. request.batch_size .. ' does not fit: keep it, or choose a new run_name')
    end
    -- A server that lost its data starts at the trainer's step.
    next_step, session = math.max(run.next_step, request.start_step or 0), run.session + 1
  end
  redis.call('HSET', key('run'), 'run_name', request.run_name, 'request', request.request, 'session', session,
    'next_step', next_step, 'batch_size', request.batch_size, 'max_staleness', request.max_staleness,
    'late_policy', request.late_policy, 'num_steps', request.num_steps, 'max_token_len', request.max_token_len,
    'group_size', request.group_size or 0, 'trainer_last_seen', now)
  changed.capacity, changed.queue = true, true
  run = load_run()
  tell('run_opened', 'run ' .. run.run_name .. ': trainer session ' .. session .. ', ' .. run.acknowledged .. ' steps done')
  return run_facts(run)
end)
