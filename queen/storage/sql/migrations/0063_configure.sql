-- configure_bucket, again: as of 0031, but for the way in which it finds what was put off. There the update joined a
-- subquery that locks, which the planner, with statistics of when the table was small, ran once for every cursor of the
-- bucket: a push that makes its queue took 30 s among 5,000 cursors.

-- The part of configure that belongs to one bucket: the lock row, the Default partition where it lives here
-- (p_partition_id NULL: it does not), and cursors that an old delay, window or retry delay had put off.
CREATE OR REPLACE FUNCTION queen.configure_bucket(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_partition_id uuid, p_partition_name text
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
SET enable_sort = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now timestamptz;
    v_partitions uuid[];
    v_groups text[];
BEGIN
    PERFORM pg_advisory_xact_lock(queen.delay_lock(p_bucket, p_queue_id));
    v_now := coalesce(p_now, clock_timestamp());
    INSERT INTO queen.queue_buckets (bucket, queue_id) VALUES (p_bucket, p_queue_id)
    ON CONFLICT ON CONSTRAINT queue_buckets_pkey DO NOTHING;
    IF p_partition_id IS NOT NULL THEN
        PERFORM FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id FOR SHARE;
        WITH born AS (
            INSERT INTO queen.partitions AS p (bucket, partition_id, queue_id, name, created_at)
            VALUES (p_bucket, p_partition_id, p_queue_id, p_partition_name, v_now)
            ON CONFLICT ON CONSTRAINT partitions_pkey DO NOTHING
            RETURNING p.partition_id
        ), counted AS (
            INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
            SELECT p_bucket, 4, p_queue_id, 1, '' FROM born
        )
        INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed)
        SELECT p_bucket, born.partition_id, g.name, p_queue_id, 0
        FROM born JOIN queen.consumer_groups g ON g.queue_id = p_queue_id
        ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING;
    END IF;
    -- found by queue, then locked and changed one by one, in order, if they still are as they were
    SELECT array_agg(o.partition_id ORDER BY o.partition_id, o.group_name),
        array_agg(o.group_name ORDER BY o.partition_id, o.group_name)
    INTO v_partitions, v_groups
    FROM (
        SELECT cu.partition_id, cu.group_name FROM queen.cursors cu
        WHERE cu.bucket = p_bucket AND cu.queue_id = p_queue_id AND cu.ready_at > v_now
            AND (cu.lease_id IS NULL OR cu.ready_at > cu.lease_expires_at)
        ORDER BY cu.group_name, cu.ready_at OFFSET 0  -- as in cursors_ready: no other index is an alternative
    ) o;
    FOR i IN 1 .. coalesce(cardinality(v_partitions), 0) LOOP
        -- a live lease goes on; only what would come after it does not
        UPDATE queen.cursors c
        SET ready_at = CASE WHEN c.lease_expires_at > v_now THEN c.lease_expires_at ELSE v_now END
        WHERE c.bucket = p_bucket AND c.partition_id = v_partitions[i] AND c.group_name = v_groups[i]
            AND c.ready_at > v_now AND (c.lease_id IS NULL OR c.ready_at > c.lease_expires_at);
    END LOOP;
    PERFORM queen.schedule_sweep(p_bucket, v_now, p_queue_id);  -- 0035_sweeps.sql
END
$$;
