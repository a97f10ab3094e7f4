-- parts.lua: makes what few calls need: groups of functions, each when it is first asked for.
--
-- A function costs when it is made, and more for each that was made before it in the same group: so what is needed
-- together is together, and nothing else is with it.
--
-- Needs   call, pack, parse, slice, byte, now, `context`, and `decide` (decide.lua)
-- Gives   part(name): a group; that of an operation's letter has the function that does it as `run`

local parts

local function part(name)
  if parts and parts[name] then return parts[name] end
  context = context or {}
  local KEYS, redis, unpack, floor, min, max = KEYS, redis, unpack, math.floor, math.min, math.max
  local call, pack, parse, slice, byte = redis.call, struct.pack, struct.unpack, string.sub, string.byte
  local states, order, made = context.states, context.order, nil

  if name == UPKEEP then
    -- What becomes of windows beside a charge.
    -- include texts
    -- include window_entries
    -- include window_take
    -- include window_upkeep
    made = {refreshed = refreshed, written = written, retry_after = retry_after, give_back = give_back}
  elseif name == REPAIR then
    -- What failed, and what is damaged.
    -- include texts
    -- include faults
    -- include window_repair
    -- include slot_repair
    made = {
      sentence = sentence, note_damage = note_damage, repaired = repaired, drop_foreign = drop_foreign,
      mended_slots = mended_slots, shorten = shorten,
    }
  elseif name == SHARING then
    -- What several charges share.
    -- include texts
    -- include slot_sets
    -- include sharing
    made = {shared = shared, flush = flush, hold_slots = hold_slots, lengthen = lengthen, keep_alive = keep_alive}
  elseif name == MONEY then
    -- Estimates and amounts spent, and what is given back of them and of windows.
    -- include texts
    -- include numbers
    -- include records
    -- include budgets
    -- include take_off
    -- include finish
    made = {
      money_plan = money_plan, open = open, decide_period = decide_period, load_period = load_period, shift = shift,
      change = change, lapse_of = lapse_of, get_record = get_record, touch = touch, forget = forget, finish = finish,
    }
  elseif name == ESTIMATES then
    -- Estimates of metered units that may have lapsed, and records of their charges.
    -- include texts
    -- include numbers
    -- include open_sets
    -- include take_off
    -- include estimates
    made = {
      decide_metered = decide_metered, lapsed = lapsed, on_set = on_set, renew_meters = renew_meters, take_off = take_off,
      open_several = open_several, write_record = write_record, read_record = read_record, find_record = find_record,
    }
  elseif name == METER then
    -- include meters
    made = {run = meter}
  elseif name == SETTLE or name == HOLD then
    -- include settle
    made = {run = name == SETTLE and settle or hold_estimate}
  elseif name == RENEW then
    -- include texts
    -- include renew
    made = {run = renew}
  else
    -- include delete
    made = {run = delete}
  end
  parts = parts or {}
  parts[name] = made
  return made
end
