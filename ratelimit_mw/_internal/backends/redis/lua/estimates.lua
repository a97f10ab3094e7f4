-- estimates.lua: estimates of metered units: given back where their lease lapses.
--
-- A meter is one unit of one scope: all its windows are charged alike. Its open estimates are a sorted set: the id of
-- the lease, when it was charged and how much, by when it lapses. A lapsed one is given back to the windows at the
-- time of its charge when a charge is refused, when somebody looks, and once in an eighth of its longest window.
--
-- Needs   get_numbers (numbers.lua), on_set (open_sets.lua), take_off.lua, note_damage (faults.lua), decide
-- Gives   decide_metered(...): as decide of decide.lua, for a charge with meters that lets estimates lapse first, or may
--         have been done before
--         lapsed(more, admitted, ...): the same for one that was asked and is refused, or found that some may have lapsed
--         read_record(record): a record of units (meters.lua) as it is stored, nil where there is none
--         renew_meters(id, record, sets, lease): lets the estimates of a lease last

local MEMBER_SIZE = 32
local LAPSED_AT_ONCE = 64

local function take_lapsed(open)
  -- The members of estimates that have lapsed, which are open no longer.
  local lapsed = on_set('ZRANGEBYSCORE', open, '-inf', text(now), 'LIMIT', '0', LAPSED_AT_ONCE)
  if #lapsed > 0 then call('ZREM', open, unpack(lapsed)) end
  return lapsed
end

local function lapse(more, op, first, n)
  -- Gives back what has lapsed of the meters of a charge; whether that was anything.
  local found = false
  for number = 1, more.n_meters do
    for _, member in ipairs(take_lapsed(KEYS[first + n + number])) do
      if #member == MEMBER_SIZE then
        found = true
        local time, spent = parse('<dd', member, ID_SIZE + 1)
        for j = 1, n do
          local _, quota, length, granule, _, meter = parse('<BddddB', op, OWN_HEAD + 1 + (j - 1) * OWN_SIZE)
          if meter == number then take_off(KEYS[first + j], quota, length, granule, time, spent) end
        end
      end
    end
  end
  return found
end

local function lapsed(admitted, more, figures, op, first, n, ...)
  while admitted == 0 and lapse(more, op, first, n) do admitted = decide(more, figures, op, first, n, ...) end
  if more.is_due then
    more.is_due = false
    lapse(more, op, first, n)
  end
  return admitted
end

local function decide_metered(more, figures, op, first, n, ...)
  if more.again then
    more.is_charged = get_numbers(KEYS[first + n + more.n_meters + 1]) ~= nil
  else
    lapse(more, op, first, n)
  end
  return lapsed(decide(more, figures, op, first, n, ...), more, figures, op, first, n, ...)
end

local function read_record(record)
  local raw = get_numbers(record)
  if raw and (#raw < UNITS_HEAD or #raw % UNITS_ENTRY ~= UNITS_HEAD) then
    part(REPAIR).note_damage(record)
    call('DEL', record)
    return nil
  end
  return raw
end

local function renew_meters(id, record, sets, lease)
  -- Lets the estimates of a lease last, but for those that have lapsed or are settled.
  local raw = read_record(record)
  if not raw then return end
  local at, is_open = parse('<dd', raw)
  if is_open ~= 1 then return end
  call('PEXPIRE', record, text(max(call('PTTL', record), KEPT_FOR)))
  for i, open in ipairs(sets) do
    local base, _, settled_at = parse('<ddd', raw, UNITS_HEAD + 1 + (i - 1) * UNITS_ENTRY)
    if settled_at < 0 and base > 0 then
      local member = pack(MEMBER, id, at, base)
      local lapses = on_set('ZSCORE', open, member)
      if lapses and tonumber(lapses) > now then call('ZADD', open, text(now + lease), member) end
    end
  end
end
