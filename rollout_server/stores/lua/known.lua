return serve(function()
  local found = {}
  for i, at in ipairs(many('ids', request.group_ids)) do
    if at then
      found[#found + 1] = request.group_ids[i]
    end
  end
  return found
end)
