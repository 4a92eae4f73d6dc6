-- Two races with configure and delete: a group registered while its queue is deleted, and a delay removed while a push or
-- a pop is putting a cursor off by it.

-- Orphans that the first may have left.
DELETE FROM queen.consumer_groups g
WHERE NOT EXISTS (SELECT FROM queen.queues q WHERE q.queue_id = g.queue_id);

-- Register a group on a queue (reference rows): what is stored already wins. False when the queue is gone. Until this
-- transaction ends the queue cannot be deleted; its options may change.
CREATE OR REPLACE FUNCTION queen.register_group(
    p_now timestamptz, p_queue_id uuid, p_group text, p_mode text, p_start_at timestamptz
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    PERFORM FROM queen.queues q WHERE q.queue_id = p_queue_id FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO queen.consumer_groups (queue_id, name, mode, start_at, floor_at, created_at)
    SELECT p_queue_id, p_group, p_mode, start.at, start.at, v_now
    FROM (SELECT CASE p_mode WHEN 'new' THEN coalesce(p_start_at, v_now) + interval '1 microsecond'
        WHEN 'from' THEN p_start_at END AS at) start
    ON CONFLICT ON CONSTRAINT consumer_groups_pkey DO NOTHING;
    RETURN true;
END
$$;

-- Whoever puts cursors off by an option of the queue (delay, window, retry delay) holds the delay lock of (queue, bucket)
-- from before it reads the option until it has committed, shared; configure takes it alone before it looks for cursors that
-- were put off. So it misses none. An advisory lock, not a row: who waits for it alone comes before those who come later to
-- share it, where a row that is shared all the time could not be had.
CREATE OR REPLACE FUNCTION queen.delay_lock(p_bucket integer, p_queue_id uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE STRICT AS $$ SELECT hashtextextended(p_queue_id::text, p_bucket) $$;

-- queen.push for queues of which one may put cursors off: with their delay locks, the first of all locks. What the push then
-- reads is what holds until it has committed.
CREATE OR REPLACE FUNCTION queen.push_delayed(
    p_bucket integer,
    p_now timestamptz,
    p_checked boolean,
    p_may_create boolean,
    p_queue_ids uuid[],
    p_queue_versions bigint[],
    p_partition_ids uuid[],
    p_partition_queues uuid[],
    p_partition_names text[],
    p_keyed_min uuid[],
    p_keyed_max uuid[],
    p_segment_parts integer[],
    p_counts integer[],
    p_minted boolean[],
    p_codecs smallint[],
    p_raw_bytes integer[],
    p_min_ids uuid[],
    p_max_ids uuid[],
    p_key_ids text[],
    p_transaction_ids bytea[],
    p_bodies bytea[],
    p_probe_parts integer[],
    p_probe_min uuid[],
    p_probe_max uuid[],
    p_probe_bound uuid[],
    p_key_parts integer[],
    p_keys bytea[],
    p_key_segments integer[],
    p_key_index integer[]
) RETURNS TABLE (
    verdict text, part integer, base_offset bigint, id_prefix bigint, created_at timestamptz,
    message_count integer, minted boolean, transaction_ids bytea, group_name text
) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(queen.delay_lock(p_bucket, q.queue_id))
    FROM (SELECT unnest(p_queue_ids) AS queue_id ORDER BY 1 OFFSET 0) q;
    RETURN QUERY SELECT * FROM queen.push(p_bucket, p_now, p_checked, p_may_create, p_queue_ids, p_queue_versions,
            p_partition_ids, p_partition_queues, p_partition_names, p_keyed_min, p_keyed_max, p_segment_parts,
            p_counts, p_minted, p_codecs, p_raw_bytes, p_min_ids, p_max_ids, p_key_ids, p_transaction_ids, p_bodies,
            p_probe_parts, p_probe_min, p_probe_max, p_probe_bound, p_key_parts, p_keys, p_key_segments,
            p_key_index);
END
$$;

-- The part of configure that belongs to one bucket: the lock row, the Default partition where it lives here
-- (p_partition_id NULL: it does not), and cursors that an old delay, window or retry delay had put off.
CREATE OR REPLACE FUNCTION queen.configure_bucket(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_partition_id uuid, p_partition_name text
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
DECLARE
    v_now timestamptz;
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
    -- a live lease goes on; only what would come after it does not
    UPDATE queen.cursors c
    SET ready_at = CASE WHEN c.lease_expires_at > v_now THEN c.lease_expires_at ELSE v_now END
    FROM (
        SELECT cu.partition_id, cu.group_name FROM queen.cursors cu
        WHERE cu.bucket = p_bucket AND cu.queue_id = p_queue_id AND cu.ready_at > v_now
            AND (cu.lease_id IS NULL OR cu.ready_at > cu.lease_expires_at)
        ORDER BY cu.partition_id, cu.group_name FOR NO KEY UPDATE
    ) put_off
    WHERE c.bucket = p_bucket AND c.partition_id = put_off.partition_id AND c.group_name = put_off.group_name;
    PERFORM queen.schedule_sweep(p_bucket, v_now, p_queue_id);  -- 0035_sweeps.sql
END
$$;
