-- window_load.lua: unpacks a window as it was read, without what has left it.
--
-- Needs   `read`: header and stage, as they are stored; key, quota, length and granule of a limit; window_start.lua;
--         UPKEEP and REPAIR (parts.lua). A part of windows.lua and of meters.lua
-- Gives   raw: header and stage as they are now, and what the header says: sum, oldest, newest, dies, newest_cost, ahead,
--         head, cap, ring, later

if #read < HEADER_SIZE then
  read = read == '' and EMPTY or part(REPAIR).repaired(DAMAGED, key, quota, length, granule, read)
end
local raw, sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = read, parse(HEADER, read)
if newest <= now and oldest > now - length and oldest <= newest and ring <= cap and sum >= 0 then
  ahead = 0
elseif newest <= now - length and oldest <= newest then
  raw = EMPTY
  sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
else
  -- include window_start
  if not raw then
    local ok, fresh = pcall(part(UPKEEP).refreshed, key, quota, length, granule, read)
    raw = ok and fresh or part(REPAIR).repaired(fresh, key, quota, length, granule, read)
  end
  sum, oldest, newest, dies, newest_cost, ahead, head, cap, ring, later = parse(HEADER, raw)
end
if later == 0 then read = raw end -- who only looks writes nothing
