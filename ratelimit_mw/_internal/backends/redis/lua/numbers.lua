-- numbers.lua: reads a value that holds numbers.
--
-- Needs   nothing but what batch.lua defines
-- Gives   get_numbers(key)

local function get_numbers(key)
  -- What a period or a record holds, nil where there is none; '' where it is something else.
  local raw = redis.pcall('GET', key)
  if not raw then return nil end
  if type(raw) == 'table' and not raw.err:find('^WRONGTYPE') then error(raw, 0) end
  return type(raw) == 'string' and raw or ''
end
