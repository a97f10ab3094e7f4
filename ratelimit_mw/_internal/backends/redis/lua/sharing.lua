-- sharing.lua: keeps what several charges of a batch share until all are decided.
--
-- Needs   hold_slots and keep_alive (slot_sets.lua), written (window_upkeep.lua), repaired (window_repair.lua)
-- Gives   shared(key, letter, quota, length, granule): the state of a key in `states`
--         flush(state): writes it, if it was changed. A state is one of a window (`raw`, and as it is stored, `read`), of
--         a slot set (ids to add, and a count), or of a period
--         (see load_period of budgets.lua)

local function shared(key, letter, quota, length, granule)
  -- What is known of a key that several charges need.
  local s = states[key]
  if not s then
    s = {
      key = key, letter = letter, quota = quota, length = length, granule = granule, n = 0, added = {}, lease = 0,
      expired = 0,
    }
    states[key], order[#order + 1] = s, s
  elseif quota > s.quota then
    s.quota, s.length, s.granule = quota, length, granule
  end
  return s
end

local function flush(s)
  if s.letter == WINDOW then
    if s.raw == s.read then return end
    local ok, fault = pcall(part(UPKEEP).written, s.key, s.quota, s.length, s.granule, s.raw)
    if not ok then part(REPAIR).repaired(fault, s.key, s.quota, s.length, s.granule, s.raw) end
  elseif s.letter == SLOTS then
    if s.n == 0 then return end
    hold_slots(s.key, s.added, s.n, s.expired)
    keep_alive(s.key, s.lease)
  elseif s.changed then
    local life = max(math.floor((s.ends - now + KEPT_AFTER_END) / 1000), 1)
    local raw = pack('<dd', s.spent, s.held)
    if s.lapsed > 0 or s.open ~= '' then raw = raw .. pack('<d', s.lapsed) .. s.open end
    call('SET', s.key, raw, 'PX', life)
  end
end
