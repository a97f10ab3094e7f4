-- budgets.lua: decides about money, and holds and spends it in the periods of budgets.
--
-- A period is spent and held; and, where estimates lapse, up to when they have lapsed, and pairs of a time and the
-- sum of what lapses then, in order: at most 34 for leases of one length, since an estimate lasts to the end of one
-- of 32 parts of its lease. Nothing is held after `lapsed` under a time up to it.
--
-- Needs   records.lua, flush (sharing.lua), note_damage (faults.lua), `decide`
-- Gives   money_plan(op, price, lease): what there is more to a charge (charges.lua) that moves money
--         decide_period(key, amount, since, ends, ...): as decide of decide.lua, for a period; `at` is the next limit's
--         open(more, key, op, n): makes the record of a charge under this key, before anything is held for it
--         load_period(key, ends): a period `p`, read once in a batch; change(p, spent, held, at): spends and holds more
--         shift(p, amount, before, at): lets what is held lapse at another time; lapse_of(p, lease): when it lapses
--         forget(): drops what is known of a charge that failed
-- Cost    two commands for a period

local PERIOD_SIZE = 16 -- of what is spent and held
local PAIR_SIZE = 16 -- of a time, and an amount that lapses then
local STEPS = 32 -- parts of a lease, to whose end an estimate lasts

local lapses, is_open = 0, false -- of the charge in hand: when its estimate lapses, whether it was held before

local function are_open(p)
  -- Whether what is open can be true: amounts in the order of their times, no more than is held.
  local last, sum = p.lapsed, 0
  for position = 1, #p.open, PAIR_SIZE do
    local at, amount = parse('<dd', p.open, position)
    if not (is_amount(at) and at > last and is_amount(amount)) then return false end
    last, sum = at, sum + amount
  end
  return is_amount(p.lapsed) and sum <= p.held
end

local function lapse(p)
  -- Holds nothing any more of what has lapsed by now.
  while p.open ~= '' do
    local at, amount = parse('<dd', p.open)
    if at > now then break end
    p.held, p.lapsed, p.open = max(p.held - amount, 0), max(p.lapsed, at), slice(p.open, PAIR_SIZE + 1)
  end
end

local function hold(p, amount, at)
  -- Holds an amount until a time, or gives back a negative one that would have lapsed then, and has not.
  if at ~= 0 then
    if at <= p.lapsed then return end
    local position, found = #p.open - PAIR_SIZE + 1, 0
    while position > 0 and parse('<d', p.open, position) > at do position = position - PAIR_SIZE end
    local before, after = slice(p.open, 1, max(position + PAIR_SIZE - 1, 0)), slice(p.open, max(position + PAIR_SIZE, 1))
    if position > 0 and parse('<d', p.open, position) == at then
      found, before = parse('<d', p.open, position + 8), slice(p.open, 1, position - 1)
    end
    amount = max(amount, -found)
    p.open = before .. (found + amount > 0 and pack('<dd', at, found + amount) or '') .. after
  end
  p.held = max(p.held + amount, 0)
end

local function lapse_of(p, lease)
  -- When an estimate lapses that is held or renewed now.
  local step = max(math.floor(lease / STEPS), 1)
  return max(math.ceil((now + lease) / step) * step, p.lapsed + 1)
end

local function load_period(key, ends)
  local p = not states or states[key]
  if type(p) == 'table' then return p end
  local raw = get_numbers(key)
  p = {key = key, letter = BUDGET, alone = p, ends = ends, spent = 0, held = 0, changed = false, lapsed = 0, open = ''}
  if raw and (#raw == PERIOD_SIZE or #raw % PAIR_SIZE == 8 and #raw > PERIOD_SIZE) then
    p.spent, p.held = parse('<dd', raw)
  elseif raw then
    p.spent = 0 / 0
  end
  -- What was lost stays beyond all amounts until a charge says how much can be spent at most.
  if not (is_amount(p.spent) and is_amount(p.held)) then
    p.spent, p.held = 2 * MOST_MONEY, 0
  elseif raw and #raw > PERIOD_SIZE then
    p.lapsed, p.open = parse('<d', raw, PERIOD_SIZE + 1), slice(raw, PERIOD_SIZE + 9)
    if are_open(p) then
      lapse(p)
    else -- held until it is settled, or the period ends
      p.lapsed, p.open = 0, ''
      part(REPAIR).note_damage(key)
    end
  end
  if not p.alone then states[key], order[#order + 1] = p, p end
  return p
end

local function change(p, spent, held, at)
  p.spent, p.changed = max(p.spent + spent, 0), true
  hold(p, held, at)
  if p.alone then part(SHARING).flush(p) end
end

local function shift(p, amount, before, at)
  -- Lets what would have lapsed at one time, if it has not, lapse at another.
  hold(p, -amount, before)
  change(p, 0, amount, at)
end

local function open(more, key, op, n)
  is_open = more.again and get_record(key) ~= nil
  if is_open then return end
  local ends, head, limit_size = 0, CHARGE_HEAD, LIMIT_SIZE
  if more.own_format then head, limit_size = OWN_HEAD, OWN_SIZE end
  for j = 1, n do
    local letter, _, _, period_ends = parse('<Bddd', op, head + 1 + (j - 1) * limit_size)
    if letter == BUDGET then ends = max(ends, period_ends) end
  end
  local life = math.floor((ends - now + KEPT_AFTER_END) / 1000)
  call('SET', key, pack('<ddd', more.price, -1, lapses), 'PX', text(life))
end

local function money_plan(op, price, lease)
  local kind = byte(op)
  return {
    again = kind == ACQUIRE_AGAIN, price = price, lease = lease, records = lease > 0 and kind ~= PEEK, has_money = true,
    n_meters = 0,
  }
end

local function decide_period(
  key, amount, since, ends, more, figures, op, first, n, number, cost, charges, j, at, alone, admitted
)
  if now < since or now >= ends then return nil end
  local price, p = more and more.price or 0, load_period(key, ends)
  if p.spent > MOST_MONEY then
    part(REPAIR).note_damage(key)
    change(p, amount - p.spent, 0, 0)
  end
  if p.spent + p.held + price > amount then admitted = 0 end
  local is_first = lapses == 0
  if price > 0 then lapses = max(lapses, lapse_of(p, more.lease)) end
  if j < n or more then
    admitted = decide(more, figures, op, first, n, number, cost, charges, j + 1, at, alone, admitted)
  end
  local lapses_at, place = lapses, 3 * j
  if is_first then lapses = 0 end
  if not admitted then return nil end
  if admitted > 0 and charges and not is_open then change(p, 0, price, lapses_at) end
  local is_short = admitted < number and p.spent + p.held + price > amount
  figures[place - 2], figures[place - 1], figures[place] = p.spent, p.held, is_short and 1 or 0
  return admitted
end

local function forget()
  lapses = 0
end
