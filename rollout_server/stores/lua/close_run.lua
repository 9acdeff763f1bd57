return serve(function()
  local run = load_run()
  -- The id protects a run that was opened between a lost answer and its repetition.
  if run and run.run_id == request.run_id then
    archive()
    tell('run_closed', 'the run was archived')
  end
end)
