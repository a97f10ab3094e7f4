-- window_credit.lua: takes a cost off an entry of a window.
--
-- Needs   a window as it is stored, `raw`, with its key, quota, length and granule; the `time` of a charge, and a `cost`;
--         window_recent.lua; give_back (window_take.lua), repaired (window_repair.lua)
-- Gives   changed: what is to be written from its start on, nil for nothing; or what is written already, if it `is_mended`

-- include window_recent
local is_mended = false
if not changed then
  local ok
  ok, changed = pcall(part(UPKEEP).give_back, key, quota, length, granule, raw, time, cost)
  if not ok then
    changed, is_mended = part(REPAIR).repaired(changed, key, quota, length, granule, raw), true
  end
end
