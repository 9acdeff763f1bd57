return serve(function()
  local run, step = need_trainer(request.session), request.step
  if step > run.acknowledged then
    refuse('step', 'commit of step ' .. step .. ' comes before its acknowledgement (steps acknowledged: ' .. run.acknowledged .. '); acknowledge it first')
  end
  if step > run.committed then
    redis.call('HSET', key('run'), 'committed', step)
    tell('committed', 'a checkpoint holds the weights after ' .. step .. ' steps')
  end
end)
