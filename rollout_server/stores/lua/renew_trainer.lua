return serve(function()
  need_trainer(request.session)
end)
