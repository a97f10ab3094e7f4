-- take_off.lua: gives back to a window.
--
-- Needs   window_credit.lua
-- Gives   take_off(key, quota, length, granule, time, cost): what a charge at `time` was charged
-- Cost    two commands

local function take_off(key, quota, length, granule, time, cost)
  if time + length <= now then return end -- it has left the window; another charge may be in its granule
  local s = states and states[key]
  local shared = type(s) == 'table' and s.raw and s
  local raw = shared and shared.raw or redis.pcall('GETRANGE', key, '0', LAST_STAGED)
  if raw == '' then return end
  -- include window_credit
  if shared then
    shared.raw = changed and changed .. slice(raw, #changed + 1) or raw
  elseif changed and not is_mended then
    call('SETRANGE', key, '0', changed)
  end
end
