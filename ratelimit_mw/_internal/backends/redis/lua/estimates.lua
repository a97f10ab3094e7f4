-- estimates.lua: estimates of metered units: charged with all else, and given back where their lease lapses.
--
-- A meter is one unit of one scope: all its windows are charged alike. Its open estimates are a sorted set: the id of
-- the lease, when it was charged and how much, by when it lapses. A lapsed one is given back to the windows at the
-- time of its charge when a charge is refused, when somebody looks, and once in an eighth of its longest window.
--
-- Needs   get_numbers (records.lua), note_damage (faults.lua), take_off (finish.lua), decide. A part of `rare`
-- Gives   decide_metered(...): as decide of decide.lua, for a charge with meters
--         open_meters(more, record): makes the record of a charge (see meters.lua), before anything is charged
--         member_of(id, at, cost): an estimate as the set of its meter has it
--         on_set(command, open, ...): does a command on such a set
-- Cost    three commands for an estimate, one for a charge without

local MEMBER_SIZE = 32
local LAPSED_AT_ONCE = 64
local KEPT_FOR = 86400000 -- a day in milliseconds: how long beyond its windows a record waits to be settled

local function member_of(id, at, cost)
  return id .. pack('<dd', at, cost)
end

local function on_set(command, open, ...)
  -- Does a command on a set of open estimates; what somebody has put in its place goes.
  local answer = redis.pcall(command, open, ...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if not answer.err:find('^WRONGTYPE') then error(answer, 0) end
  call('DEL', open)
  note_damage(open)
  return call(command, open, ...)
end

local function take_lapsed(open)
  -- The members of estimates that have lapsed, which are open no longer.
  local lapsed = on_set('ZRANGEBYSCORE', open, '-inf', text(now), 'LIMIT', '0', LAPSED_AT_ONCE)
  if #lapsed > 0 then call('ZREM', open, unpack(lapsed)) end
  return lapsed
end

local function lapse(more)
  -- Gives back what has lapsed of the meters of a charge; whether that was anything.
  local found = false
  for number, meter in ipairs(more.meters) do
    for _, member in ipairs(take_lapsed(KEYS[more.first + more.n + number])) do
      if #member == MEMBER_SIZE then
        found = true
        local at, cost = parse('<dd', member, ID_SIZE + 1)
        for _, j in ipairs(meter) do
          local quota, length, granule = parse('<ddd', more.op, OWN_HEAD + 2 + (j - 1) * OWN_SIZE)
          take_off(KEYS[more.first + j], quota, length, granule, at, cost)
        end
      end
    end
  end
  return found
end

local function decide_metered(more, figures, op, first, n, number, cost, charges, j, at, alone, admitted)
  if not charges then lapse(more) end
  more.is_charged = more.again and get_numbers(KEYS[more.first + more.n + more.n_meters + 1]) ~= nil
  local decided
  repeat
    decided = decide(more, figures, op, first, n, number, cost, charges, j, at, alone, admitted)
  until decided ~= 0 or not lapse(more)
  if more.is_due then
    more.is_due = false
    lapse(more)
  end
  return decided
end

local function open_meters(more, record)
  if more.is_charged then return end
  local parts, life, id = {pack('<dd', now, 1)}, 0, slice(more.op, -ID_SIZE)
  for number, meter in ipairs(more.meters) do
    parts[number + 1], life = pack('<ddd', meter.cost, 0, -1), max(life, meter.longest)
  end
  call('SET', record, table.concat(parts), 'PX', text(math.floor(life / 1000) + KEPT_FOR))
  for number, meter in ipairs(more.meters) do
    if meter.cost > 0 then
      local open = KEYS[more.first + more.n + number]
      on_set('ZADD', open, text(now + more.lease), member_of(id, now, meter.cost))
      local life_of_set = math.floor(meter.longest / 1000) + 1000
      local lives = call('PTTL', open)
      if lives < life_of_set then
        call('PEXPIRE', open, text(math.floor(1.125 * life_of_set)))
        more.is_due = lives >= 0 -- a new one has nothing that can have lapsed
      end
    end
  end
end
