-- Binds groups that Python chose to the next step, if what it looked at still holds; otherwise answers again = true.

local function queued_groups()
  local groups = {}
  for i, member in ipairs(request.members) do
    local order = redis.call('ZSCORE', key('queue'), member)
    if not order then
      return nil
    end
    groups[i] = read_member(member, order)
  end
  return groups
end

local function are_in_flight(version)
  for other, groups in pairs(numbers('flight')) do
    if other <= version and groups > 0 then
      return true
    end
  end
  return false
end

-- The version up to which too much would stay behind this batch, and whether some of it is in flight.
local function stranded(run, groups)
  local stays = numbers('pending')
  for _, group in ipairs(groups) do
    if group.oldest >= 0 then
      stays[group.oldest] = stays[group.oldest] - group.sequences
    end
  end
  local version = overfull_version(run, run.next_step + 1, stays)
  return version, version ~= nil and are_in_flight(version)
end

-- Void the oldest groups in flight until the rest can be trained in time.
local function give_up(run, groups)
  local tickets = {}
  for _, pair in ipairs(pairs_of('ticket')) do
    tickets[#tickets + 1] = {pair[1], read_ticket(pair[1])}
  end
  table.sort(tickets, function(a, b)
    return a[2].version < b[2].version or (a[2].version == b[2].version and a[2].serial < b[2].serial)
  end)
  for _, ticket in ipairs(tickets) do
    local _, is_in_flight = stranded(run, groups)
    if not is_in_flight then
      return
    end
    void_tickets({ticket[1]}, run.late_policy)
  end
end

local function bind(run, groups)
  local step, keys, tokens = run.next_step, {}, 0
  for i, group in ipairs(groups) do
    dequeue(group)
    count_trained(group, 1)
    redis.call('HSET', key('steps'), group.key, step)
    keys[i], tokens = group.key, tokens + group.tokens
  end
  redis.call('HSET', key('batches'), step, cmsgpack.pack(keys))
  redis.call('HSET', key('run'), 'next_step', step + 1)
  redis.call('HDEL', key('run'), 'waits_for')
  changed.capacity = true
  tell('batch_formed', 'batch of step ' .. step .. ': ' .. #groups .. ' groups, ' .. tokens .. ' tokens')
end

return serve(function()
  local run = need_trainer(request.session)
  local groups = run.next_step == request.step and queued_groups()
  if not groups then
    return {again = true}
  end
  local version, is_in_flight = stranded(run, groups)
  if is_in_flight and run.late_policy ~= 'wait' then
    give_up(run, groups)
  elseif is_in_flight or version ~= request.overfull then
    return {again = true}
  end
  bind(run, groups)
  return {batch = batch_rows(request.step)}
end)
