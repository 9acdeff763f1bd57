return serve(function()
  need_env(request.env_id, request.session)
  return void_tickets(request.tickets, request.reason)
end)
