return serve(function()
  return run_facts(need_run())
end)
