-- estimates.lua: estimates of metered units: given back where their lease lapses; and what few settles need.
--
-- A meter is one unit of one scope: all its windows are charged alike. Its open estimates are a sorted set: the id of
-- the lease, when it was charged and how much, by when it lapses. A lapsed one is given back to the windows at the
-- time of its charge when a charge is refused, when somebody looks, and once in an eighth of its longest window.
--
-- Needs   get_numbers (numbers.lua), on_set (open_sets.lua), take_off.lua, note_damage (faults.lua), decide
-- Gives   decide_metered(...): as decide of decide.lua, for a charge with meters that lets estimates lapse first, or may
--         have been done before; several of one kind are not asked again where some are refused
--         lapsed(more, admitted, ...): the same for one that was asked and is refused, or found that some may have lapsed
--         open_several(open, lapses, op, at, number, estimate): opens the estimates of several ids
--         write_record(key, op, n, n_meters, at): makes the record of a charge at a time (meters.lua)
--         read_record(record): a record as it is stored, nil where there is none
--         find_record(op, first, record): what a record would say of a charge that has none, nil where nothing is known
--         renew_meters(id, estimates, lease): lets the estimates of a lease last

local LAPSED_AT_ONCE = 64

local function lapse_key(open, id)
  -- The key that notes that the estimate of a lease for a meter has lapsed.
  local digits = id:gsub('.', function(letter) return string.format('%02x', byte(letter)) end)
  local partition, scope = open:match('^(.-}:)e:(.*)$')
  return partition .. 'u:' .. digits .. ':' .. scope
end

local function take_lapsed(open)
  -- The members of estimates that have lapsed, which are open no longer.
  local lapsed = on_set('ZRANGEBYSCORE', open, '-inf', text(now), 'LIMIT', '0', LAPSED_AT_ONCE)
  if #lapsed > 0 then call('ZREM', open, unpack(lapsed)) end
  return lapsed
end

local function lapse(more, op, first, n)
  -- Gives back what has lapsed of the meters of a charge, and notes it for a settle that comes late; whether that was
  -- anything.
  local found = false
  for number = 1, more.n_meters do
    local open = KEYS[first + n + number]
    for _, member in ipairs(take_lapsed(open)) do
      if #member == MEMBER_SIZE then
        found = true
        local time, spent = parse('<dd', member, ID_SIZE + 1)
        for j = 1, n do
          local _, quota, length, granule, _, meter = parse('<BddddB', op, OWN_HEAD + 1 + (j - 1) * OWN_SIZE)
          if meter == number then take_off(KEYS[first + j], quota, length, granule, time, spent) end
        end
        -- In a slot of a cluster that is moving it can't be noted.
        redis.pcall('SET', lapse_key(open, slice(member, 1, ID_SIZE)), pack('<d', time), 'PX', text(KEPT_FOR))
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

local function find(open, id)
  -- When the estimate of a lease was charged, where only its id is known: its answer was lost.
  for _, member in ipairs(on_set('ZRANGE', open, '0', '-1')) do
    if slice(member, 1, ID_SIZE) == id then return (parse('<d', member, ID_SIZE + 1)) end
  end
  return nil
end

local function open_several(open, lapses, op, at, number, estimate)
  local added = {}
  for i = 1, 2 * number, 2 do
    added[i], added[i + 1], at = lapses, pack(MEMBER, slice(op, at, at + ID_SIZE - 1), now, estimate), at + ID_SIZE
  end
  on_set('ZADD', open, unpack(added))
end

local function write_record(key, op, n, n_meters, at)
  local record, life = pack('<dd', at, 1), 0
  for number = 1, n_meters do
    local estimate, longest = parse('<dd', op, OWN_HEAD + n * OWN_SIZE + 1 + (number - 1) * METER_SIZE)
    record, life = record .. pack('<ddd', estimate, 0, -1), max(life, longest)
  end
  call('SET', key, record, 'PX', text(floor(life / 1000) + KEPT_FOR))
end

local function decide_metered(more, figures, op, first, n, ...)
  if more.again then
    local record, at = KEYS[first + n + more.n_meters + 1], nil
    more.is_charged = get_numbers(record) ~= nil
    for number = 1, more.is_charged and 0 or more.n_meters do
      at = at or find(KEYS[first + n + number], slice(op, -ID_SIZE))
    end
    if at then -- without a record
      write_record(record, op, n, more.n_meters, at)
      more.is_charged = true
    end
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

local function find_record(op, first, record)
  local _, _, mode, n, otherwise = byte(op, 1, METER_HEAD)
  local id, position, key_at, charged, entries, is_known = slice(op, -ID_SIZE), METER_HEAD + 1, first + 1, 0, '', false
  for _ = 1, n do
    local amount, at, estimate, before, n_windows = parse('<ddddB', op, position)
    local open, base, settled_at, score = KEYS[key_at], 0, -1, nil
    if estimate > 0 then
      if at == 0 then at = find(open, id) or 0 end
      score = on_set('ZSCORE', open, pack(MEMBER, id, at, estimate))
    end
    if score then
      base = estimate
    elseif before >= 0 then
      base, settled_at = before, now
    elseif otherwise ~= HAS_LAPSED and (otherwise == IS_OVER or not get_numbers(lapse_key(open, id))) then
      base, settled_at = max(amount, 0), now
    end
    is_known = is_known or score or before >= 0 or otherwise ~= IS_OVER
    charged, entries = max(charged, at), entries .. pack('<ddd', base, 0, settled_at)
    position, key_at = position + METER_FIXED + METER_WINDOW * n_windows, key_at + 1 + n_windows
  end
  if not is_known then return nil end
  local found = pack('<dd', charged, 1) .. entries
  if mode < UNITS_KEEP then
    call('PEXPIRE', record, text(KEPT_FOR)) -- the first write has to be one that works when memory is full
    call('SET', record, found, 'PX', text(KEPT_FOR))
  end
  return found
end

local function renew_meters(id, estimates, lease)
  -- Lets the estimates of a lease last, but for those that have lapsed or are settled. A negative time is the latest at
  -- which one may have been charged.
  for _, estimate in ipairs(estimates) do
    local open, at, amount = unpack(estimate)
    local member = pack(MEMBER, id, math.abs(at), amount)
    local lapses = on_set('ZSCORE', open, member)
    if not lapses and at < 0 then
      at = find(open, id)
      member = at and pack(MEMBER, id, at, amount)
      lapses = at and on_set('ZSCORE', open, member)
    end
    if lapses and tonumber(lapses) > now then
      -- The first write has to be one that works when memory is full.
      call('PEXPIRE', open, text(max(call('PTTL', open), floor(1.125 * lease / 1000) + 1000)))
      call('ZADD', open, text(now + lease), member)
    end
  end
end
