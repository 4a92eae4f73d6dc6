-- State of streams is found by the right index also where the plan was made for a few rows: what has gone with a
-- partition one by one, by the whole of the key (joined, all state of the bucket was looked through), and what is ripe in
-- the order of its index.

-- Forget what queries remember of partitions that are being removed.
CREATE OR REPLACE FUNCTION queen.forget_stream_partitions(p_bucket integer, p_partition_ids uuid[]) RETURNS void
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_gone record;
BEGIN
    FOR v_gone IN
        DELETE FROM queen.stream_partitions s WHERE s.bucket = p_bucket AND s.partition_id = ANY (p_partition_ids)
        RETURNING s.query_id, s.partition_id
    LOOP
        DELETE FROM queen.stream_state s
        WHERE s.bucket = p_bucket AND s.query_id = v_gone.query_id AND s.partition_id = v_gone.partition_id;
    END LOOP;
END
$$;

-- Read state, ordered by key. Filters are joined by AND; those that are NULL do not count. p_from <= key < p_to.
CREATE OR REPLACE FUNCTION queen.read_stream_state(
    p_bucket integer, p_query_id uuid, p_partition_id uuid, p_keys bytea[], p_from bytea, p_to bytea,
    p_ripe_until double precision
) RETURNS TABLE (key bytea, codec smallint, key_id text, value bytea, updated_at timestamptz) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_sort = off SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF p_keys IS NOT NULL THEN
        RETURN QUERY SELECT s.key, s.codec, s.key_id, s.value, s.updated_at FROM queen.stream_state s
            WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
                AND s.key = ANY (p_keys) AND s.key >= p_from AND s.key < p_to
                AND (p_ripe_until IS NULL OR s.window_end <= p_ripe_until)
            ORDER BY s.key;
    ELSIF p_ripe_until IS NOT NULL THEN
        -- first by the end of the window: of many that are open, few are over. In that order, and without sorts, so that
        -- no other index is an alternative, however few rows there were when the plan was made
        RETURN QUERY WITH ripe AS MATERIALIZED (
                SELECT * FROM queen.stream_state s
                WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
                    AND s.window_end <= p_ripe_until
                ORDER BY s.window_end
            )
            SELECT r.key, r.codec, r.key_id, r.value, r.updated_at FROM ripe r
            WHERE r.key >= p_from AND r.key < p_to
            ORDER BY r.key;
    ELSE
        RETURN QUERY SELECT s.key, s.codec, s.key_id, s.value, s.updated_at FROM queen.stream_state s
            WHERE s.bucket = p_bucket AND s.query_id = p_query_id AND s.partition_id = p_partition_id
                AND s.key >= p_from AND s.key < p_to
            ORDER BY s.key;
    END IF;
END
$$;
