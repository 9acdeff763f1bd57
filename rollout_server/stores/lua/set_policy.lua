return serve(function()
  publish_policy(need_trainer(request.session), request.policy_version)
end)
