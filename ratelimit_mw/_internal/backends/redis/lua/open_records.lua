-- open_records.lua: notes the estimates of a charge that all its limits admit, before any is charged.
--
-- Needs   a charge and `more` (charges.lua); `behind`: the number of keys before those behind the limits'; open
--         (budgets.lua); on_set, write_record, open_several (estimates.lua). A part of `decide`
-- Gives   nothing; it sets more.is_due where estimates of a meter may have lapsed
-- Cost    two commands for an estimate of units, one for one of money, one for a charge that may be sent again

local n_meters = more.n_meters
if n_meters > 0 and not more.is_charged then
  if more.again then part(ESTIMATES).write_record(KEYS[behind + n_meters + 1], op, n, n_meters, now) end
  local texts, ids_at = figures.texts, #op - number * ID_SIZE + 1
  local lapses = texts and texts[more.lease] or string.format('%.0f', now + more.lease)
  if texts then texts[more.lease] = lapses else more.lapses = lapses end
  for meter = 1, n_meters do
    local estimate, longest = parse('<dd', op, OWN_HEAD + n * OWN_SIZE + 1 + (meter - 1) * METER_SIZE)
    if estimate > 0 then
      local open = KEYS[behind + meter]
      if admitted == 1 then
        local member = pack(MEMBER, slice(op, ids_at, ids_at + ID_SIZE - 1), now, estimate)
        local added = redis.pcall('ZADD', open, lapses, member)
        if type(added) == 'table' then part(ESTIMATES).on_set('ZADD', open, lapses, member) end
      else
        part(ESTIMATES).open_several(open, lapses, op, ids_at, admitted, estimate)
      end
      local lives = call('PTTL', open)
      if more.lease > longest then longest = more.lease end
      if lives < longest / 1000 then
        if lives < 0 then call('ZADD', open, '+inf', KEEPS_SET) end
        call('PEXPIRE', open, math.floor(1.125 * longest / 1000) + 1000)
        more.is_due = lives >= 0 -- a new one has nothing that can have lapsed
      end
    end
  end
end
if more.has_money then part(MONEY).open(more, KEYS[behind + n_meters + (more.again and n_meters > 0 and 2 or 1)], op, n) end
