-- take_off.lua: gives back to a window.
--
-- Needs   give_back (window_upkeep.lua), repaired (window_repair.lua)
-- Gives   take_off(key, quota, length, granule, time, cost): what a charge at `time` was charged
-- Cost    two commands

local function take_off(key, quota, length, granule, time, cost)
  local s = states and states[key]
  local shared = type(s) == 'table' and s.raw and s
  local raw = shared and shared.raw or redis.pcall('GETRANGE', key, '0', LAST_STAGED)
  if raw == '' then return end
  local changed
  -- include window_credit
  if not changed then
    local ok
    ok, changed = pcall(part(UPKEEP).give_back, key, quota, length, granule, raw, time, cost)
    if not ok then
      changed = part(REPAIR).repaired(changed, key, quota, length, granule, raw)
      if shared then shared.raw = changed end
      return
    end
  end
  if shared then
    shared.raw = changed or raw
  elseif changed then
    call('SETRANGE', key, '0', changed)
  end
end
