-- partition_states, as of 0008: of groups that are equally slow, the one that is working on it says what is in processing.
-- It was any of them.

-- What is in partitions of a queue. `ahead` is what the slowest group has not consumed, `processing` what it has under a
-- live lease; dead letters are counted up to 1,000.
CREATE OR REPLACE FUNCTION queen.partition_states(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_queue_id uuid, p_ids uuid[]
) RETURNS TABLE (
    partition_id uuid, name text, created_at timestamptz, total bigint, ahead bigint, processing bigint,
    dead_letters bigint, consumed bigint, oldest_at timestamptz, newest_at timestamptz, active_at timestamptz
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    RETURN QUERY
        SELECT p.partition_id, p.name, p.created_at, p.next_offset - p.first_offset - p.erased,
            p.next_offset - greatest(slowest.committed, p.first_offset) - coalesce(slowest.skips, 0),
            coalesce(slowest.processing, 0), dead.letters, coalesce(slowest.committed, 0), p.oldest_at,
            CASE WHEN p.oldest_at IS NOT NULL THEN p.last_created_at END,
            greatest(p.last_created_at, slowest.consumed_at)
        FROM unnest(p_ids) WITH ORDINALITY AS given (partition_id, number)
        CROSS JOIN LATERAL (
            SELECT pa.* FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.partition_id = given.partition_id LIMIT 1
        ) p
        LEFT JOIN LATERAL (
            SELECT c.committed, c.consumed_at,
                CASE WHEN c.lease_expires_at > v_now AND c.lease_epoch = p_epoch
                    THEN c.lease_end - greatest(c.lease_first, c.committed) END AS processing,
                queen.skips_ahead(c.skips, c.committed) AS skips
            FROM queen.cursors c
            JOIN queen.consumer_groups g ON g.queue_id = p_queue_id AND g.name = c.group_name
            WHERE c.bucket = p_bucket AND c.partition_id = given.partition_id
            ORDER BY c.committed, processing DESC NULLS LAST LIMIT 1
        ) slowest ON true
        CROSS JOIN LATERAL (
            SELECT count(*) AS letters FROM (
                SELECT FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = given.partition_id
                LIMIT 1000
            ) d
        ) dead
        ORDER BY given.number;
END
$$;
