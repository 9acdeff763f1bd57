return serve(function()
  local last, keys, rows = number('totals', 'last_key'), {}, {}
  for at = request.after + 1, math.min(request.after + request.limit, last) do
    keys[#keys + 1] = at
  end
  local steps, reasons = many('steps', keys), many('retired', keys)
  for i, group in ipairs(ledger_of(keys)) do
    rows[i] = {
      group.group_id, group.env_id, group.sequences, group.tokens, group.oldest, tonumber(steps[i] or '-1'), reasons[i] or '',
    }
  end
  return {rows = rows, last_key = last}
end)
