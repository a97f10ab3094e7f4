-- close_rest.lua: what close.lua needs for entries in the ring of a window.
--
-- Needs   a part of close.lua
-- Gives   give_back(...): as of window_take.lua

local redis, floor, min, max = redis, math.floor, math.min, math.max
-- include texts
-- include window_entries
-- include window_take
