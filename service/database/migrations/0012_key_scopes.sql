-- A key of the scope read gets neither raw bodies nor addresses. Existing keys keep what they could read before.
ALTER TABLE api_keys DROP CONSTRAINT api_keys_scope_check;
UPDATE api_keys SET scope = 'read:bodies' WHERE scope = 'read';
ALTER TABLE api_keys ADD CONSTRAINT api_keys_scope_check CHECK (scope IN ('read', 'read:bodies', 'admin'));
