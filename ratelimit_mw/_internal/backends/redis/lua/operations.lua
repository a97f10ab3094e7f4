-- operations.lua: walks over the operations of a batch: once for all but charges, once for charges.
--
-- Needs   decide.lua, charges.lua, charge_answers.lua, stay.lua, overdue.lua, release (releases.lua);
--         parts.lua
-- Gives   all_but_charges(), all_charges(): do the operations from `index` on, and leave `index` at one that failed
--         replies: the answers, by index; firsts: the number of keys before those of each charge

local replies, firsts = {now}, {0} -- `firsts` as `keys` below, of charges
local index, keys = 2, 0 -- of the operation in hand: its index in ARGV, and the number of keys before its own
local any_shared = false -- whether several charges need a key
local shared_states -- `states` where several do
local looks = byte(flags) ~= DISJOINT and byte(flags) ~= DISJOINT_SPREAD -- whether any may
local figures = {texts = {}} -- of the charge in hand; and times as arguments, which are the same for most of a batch

local function all_but_charges()
  while index <= #ARGV do
    local op, first = ARGV[index], keys
    local kind, n, mode = byte(op, 1, 3)
    -- The number of keys is read from the operation alone: one which fails cannot shift those of the next.
    if kind == ACQUIRE or kind == PEEK or kind == TAKE_AHEAD or kind == ACQUIRE_AGAIN or kind >= OWN_COSTS then
      firsts[index] = first
      for i = first + 1, looks and first + n or 0 do
        local key = KEYS[i]
        local known = states[key]
        any_shared = any_shared or known ~= nil
        if known == nil or known == true then states[key] = not known end
      end
      -- No lease but 0 has a 0.
      keys = first + n + (kind >= OWN_COSTS and mode or byte(op, CHARGE_HEAD) > 0 and 1 or 0)
    elseif kind == FINISH then
      keys = first + n + (mode ~= MONEY_UNTOUCHED and 1 or 0)
      replies[index] = release(op, first)
    else
      keys = (kind == DELETE or kind == METER) and n or kind == RENEW and n + 256 * mode or byte(op, SETTLE_HEAD) + 1
      keys = first + keys
      -- include overdue
      if is_overdue then error(LATE, 0) end
      -- include stay
      replies[index] = part(kind).run(op, first)
    end
    index = index + 1
  end
end

local function all_charges()
  while index <= #ARGV do
    local op, first = ARGV[index], firsts[index]
    if first then
      local kind = byte(op)
      -- include charges
      if fault then error(fault, 0) end
      if more then
        -- include stay
      end
      if shared_states then
        more = more or {n_meters = 0}
        more.states = shared_states
      end
      local meters, alone = more and more.n_meters > 0, not shared_states
      local asks = meters and (not charges or more.again or number > 1) and part(ESTIMATES).decide_metered or decide
      local admitted = asks(more, figures, op, first, n, number, cost, charges, 1, at, alone, number)
      if meters and (admitted == 0 or more.is_due) then
        asks = part(ESTIMATES).lapsed -- of this charge, which has been asked
        admitted = asks(admitted, more, figures, op, first, n, number, cost, charges, 1, at, alone, number)
      end
      -- include charge_answers
      replies[index] = answer
    end
    index = index + 1
  end
end
