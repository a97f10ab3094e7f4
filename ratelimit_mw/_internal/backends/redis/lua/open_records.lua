-- open_records.lua: makes the records of a charge that all its limits admit, before any is charged.
--
-- Needs   a charge and `more` (charges.lua), `behind`: the number of keys before those behind the limits'; open
--         (budgets.lua), on_set (open_sets.lua). A part of `decide`
-- Gives   nothing; it sets more.is_due where estimates of a meter may have lapsed
-- Cost    three commands for an estimate of units, one for a charge without, one for money

local n_meters, has_units = more.n_meters, more.meters and not more.is_charged
if has_units then
  local record, life, meters_at = pack('<dd', now, 1), 0, OWN_HEAD + n * OWN_SIZE + 1
  for meter_at = meters_at, meters_at + (n_meters - 1) * METER_SIZE, METER_SIZE do
    local estimate, longest = parse('<dd', op, meter_at)
    record, life = record .. pack('<ddd', estimate, 0, -1), math.max(life, longest)
  end
  call('SET', KEYS[behind + n_meters + 1], record, 'PX', math.floor(life / 1000) + KEPT_FOR)
  for number = 1, n_meters do
    local estimate, longest = parse('<dd', op, meters_at + (number - 1) * METER_SIZE)
    if estimate > 0 then
      local open, lapses, member = KEYS[behind + number], now + more.lease, pack(MEMBER, slice(op, -ID_SIZE), now, estimate)
      local added = redis.pcall('ZADD', open, lapses, member)
      if type(added) == 'table' then part(ESTIMATES).on_set('ZADD', open, lapses, member) end
      local life_of_set, lives = math.floor(longest / 1000) + 1000, call('PTTL', open)
      if lives < life_of_set then
        if lives < 0 then call('ZADD', open, '+inf', KEEPS_SET) end
        call('PEXPIRE', open, math.floor(1.125 * life_of_set))
        more.is_due = lives >= 0 -- a new one has nothing that can have lapsed
      end
    end
  end
end
if more.has_money then part(MONEY).open(more, KEYS[behind + n_meters + (more.meters and 2 or 1)], op, n) end
