-- settle.lua: puts what was really spent in place of an estimate, or holds the estimate until that is known.
--
-- Needs   of MONEY get_record and touch (records.lua), load_period, change and shift (budgets.lua)
-- Gives   settle(op, first), hold_estimate(op, first): the answers

local AMOUNT_AT = 2 -- the offset of the amount in a packed settle
local HELD = '\1'
local HELD_BEFORE = '\2'

local money = part(MONEY)

local function settle(op, first)
  local amount, replace, n, position = parse('<dBB', op, AMOUNT_AT)
  if not (amount >= 0 and amount <= MOST_MONEY) then error('ERR an amount is a number from 0', 0) end
  local record = KEYS[first + n + 1]
  local estimate, settled, at = money.get_record(record)
  if not estimate then return UNKNOWN end
  if settled == amount then return REPEATED end
  if settled >= 0 and replace == 0 then return DIFFERENT end
  local periods = {}
  for j = 1, n do
    local ends
    ends, position = parse('<d', op, position)
    periods[j] = money.load_period(KEYS[first + j], ends)
  end
  local life = math.min(money.touch(record), SETTLED_FOR)
  call('SET', record, pack('<ddd', estimate, amount, at), 'PX', life)
  for _, p in ipairs(periods) do money.change(p, amount - max(settled, 0), settled < 0 and -estimate or 0, at) end
  return SETTLED
end

local function hold_estimate(op, first)
  local n, position = parse('<B', op, SETTLE_HEAD)
  local record = KEYS[first + n + 1]
  local estimate, settled, at = money.get_record(record)
  if not estimate then return UNKNOWN end
  if settled >= 0 or at == 0 then return HELD_BEFORE end
  local periods = {}
  for j = 1, n do
    local ends
    ends, position = parse('<d', op, position)
    periods[j] = money.load_period(KEYS[first + j], ends)
  end
  money.touch(record)
  call('SETRANGE', record, LAPSES_AT, pack('<d', 0))
  for _, p in ipairs(periods) do money.shift(p, estimate, at, 0) end
  return HELD
end
