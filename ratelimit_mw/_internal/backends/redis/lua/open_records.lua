-- open_records.lua: makes the records of a charge that all its limits admit, before any is charged.
--
-- Needs   a charge and `more` (charges.lua), `behind`: the number of keys before those behind the limits'; open
--         (budgets.lua), on_set (open_sets.lua). A part of `decide`
-- Gives   nothing; it sets more.is_due where estimates of a meter may have lapsed
-- Cost    three commands for an estimate of units, one for a charge without, one for money

local n_meters = more.n_meters
if more.meters and not more.is_charged then
  local record, life, meters_at, estimate, longest = nil, 0, OWN_HEAD + n * OWN_SIZE + 1, nil, nil
  for number = 1, n_meters do
    estimate, longest = parse('<dd', op, meters_at + (number - 1) * METER_SIZE)
    record = record and record .. pack('<ddd', estimate, 0, -1) or pack('<ddddd', now, 1, estimate, 0, -1)
    if longest > life then life = longest end
  end
  call('SET', KEYS[behind + n_meters + 1], record, 'PX', math.floor(life / 1000) + KEPT_FOR)
  local texts = figures.texts
  local lapses = texts and texts[more.lease] or string.format('%.0f', now + more.lease)
  if texts then texts[more.lease] = lapses else more.lapses = lapses end
  for number = n_meters, 1, -1 do
    if number < n_meters then estimate, longest = parse('<dd', op, meters_at + (number - 1) * METER_SIZE) end
    if estimate > 0 then
      local open, member = KEYS[behind + number], pack(MEMBER, slice(op, -ID_SIZE), now, estimate)
      local added = redis.pcall('ZADD', open, lapses, member)
      if type(added) == 'table' then part(ESTIMATES).on_set('ZADD', open, lapses, member) end
      local lives = call('PTTL', open)
      if lives < longest / 1000 then
        if lives < 0 then call('ZADD', open, '+inf', KEEPS_SET) end
        call('PEXPIRE', open, math.floor(1.125 * longest / 1000) + 1000)
        more.is_due = lives >= 0 -- a new one has nothing that can have lapsed
      end
    end
  end
end
if more.has_money then part(MONEY).open(more, KEYS[behind + n_meters + (more.meters and 2 or 1)], op, n) end
