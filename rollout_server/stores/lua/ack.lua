return serve(function()
  local run, step = need_trainer(request.session), request.step
  if step >= run.next_step then
    refuse('step', 'step ' .. step .. ' cannot be acknowledged: its batch was never handed out (next is ' .. run.next_step .. '); lease it first')
  end
  publish_policy(run, request.policy_version)
  if step >= run.acknowledged then
    redis.call('HSET', key('run'), 'acknowledged', step + 1)
    tell('step_acknowledged', 'step ' .. step .. ' is done')
  end
  changed.capacity = true
end)
