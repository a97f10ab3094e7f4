-- records.lua: reads what was estimated and settled for one charge.
--
-- A record is three doubles: the estimate, the settled amount (-1: none yet) and when the estimate lapses (0: never,
-- -1: it has).
--
-- Needs   get_numbers (numbers.lua), note_damage (faults.lua)
-- Gives   get_record(key): the three numbers, nil where there is none; touch(record): a first write when memory is full
--         is_amount(number): for periods, too

local RECORD_SIZE = 24
local SETTLED_FOR = 86400000 -- a day in milliseconds: how long after it was settled an amount can be replaced
local WITHOUT_LAPSE = 16 -- of one that an earlier version wrote, whose estimate never lapses
local LAPSES_AT = '16' -- the offset of the time, as an argument

local function is_amount(number)
  return number >= 0 and number <= MOST_MONEY and number % 1 == 0 -- no NaN
end

local function get_record(key)
  -- What was estimated and settled, and when it lapses. Of a damaged one the estimate stays held, and it can be
  -- settled.
  local raw = get_numbers(key)
  if not raw then return nil end
  local estimate, settled, at = 0 / 0, -1, 0
  if #raw == WITHOUT_LAPSE then estimate, settled = parse('<dd', raw) end
  if #raw == RECORD_SIZE then estimate, settled, at = parse('<ddd', raw) end
  if not (is_amount(estimate) and (settled == -1 or is_amount(settled)) and (at == -1 or is_amount(at))) then
    part(REPAIR).note_damage(key)
    return 0, -1, 0
  end
  return estimate, settled, at
end

local function touch(record)
  -- A first write that is let through when memory is full. What somebody put in place of a record has no end.
  local life = call('PTTL', record)
  life = life < 0 and SETTLED_FOR or max(life, 1)
  call('PEXPIRE', record, life)
  return life
end
