-- What ANALYZE finds in a table of a row or two is no estimate of what it will be: a bucket or queue seen once is taken
-- for one of a kind, and an index on it for as good as a key. So it is said here how many there are: every bucket alike,
-- and a queue or group to one row in a hundred. It counts from the next ANALYZE on.

ALTER TABLE queen.queue_buckets ALTER COLUMN bucket SET (n_distinct = 1);
ALTER TABLE queen.partitions ALTER COLUMN bucket SET (n_distinct = 1), ALTER COLUMN queue_id SET (n_distinct = 100);
ALTER TABLE queen.segments ALTER COLUMN bucket SET (n_distinct = 1);
ALTER TABLE queen.transaction_ids ALTER COLUMN bucket SET (n_distinct = 1);
ALTER TABLE queen.cursors ALTER COLUMN bucket SET (n_distinct = 1), ALTER COLUMN queue_id SET (n_distinct = 100),
    ALTER COLUMN group_name SET (n_distinct = 100);
ALTER TABLE queen.dead_letters ALTER COLUMN bucket SET (n_distinct = 1), ALTER COLUMN queue_id SET (n_distinct = 100),
    ALTER COLUMN group_name SET (n_distinct = 100);
ALTER TABLE queen.count_changes ALTER COLUMN bucket SET (n_distinct = 1);
ALTER TABLE queen.stream_partitions ALTER COLUMN bucket SET (n_distinct = 1), ALTER COLUMN query_id SET (n_distinct = 100);
ALTER TABLE queen.stream_state ALTER COLUMN bucket SET (n_distinct = 1), ALTER COLUMN query_id SET (n_distinct = 100);
ALTER TABLE queen.expired_ranges ALTER COLUMN bucket SET (n_distinct = 1);
ALTER TABLE queen.queue_sweeps ALTER COLUMN bucket SET (n_distinct = 1);

-- Without statistics of columns (between the two halves of the first autovacuum of a table, and plans made then stay) a
-- bucket is taken for as good as a key, too: one of 200. So no index that leads with it is left beside the key that pushes
-- and pops are to find their partitions by.
DROP INDEX queen.partitions_by_queue_and_age;
CREATE INDEX partitions_by_queue_and_age ON queen.partitions (queue_id, bucket, oldest_at);

-- Rare, and of many tables that may have been empty until now: planned for what there is, each time. Nothing is looked for
-- where there is nothing to remove.
CREATE OR REPLACE FUNCTION queen.remove_partitions(p_bucket integer, p_ids uuid[]) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off SET plan_cache_mode = force_custom_plan SET jit = off
AS $$
BEGIN
    IF cardinality(p_ids) = 0 THEN
        RETURN;
    END IF;
    PERFORM FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = ANY (p_ids)
    ORDER BY c.partition_id, c.group_name FOR UPDATE;
    WITH gone AS (
        DELETE FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = ANY (p_ids)
        RETURNING c.queue_id, c.group_name, c.committed
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 5, g.queue_id, -sum(g.committed), g.group_name FROM gone g
    GROUP BY g.queue_id, g.group_name HAVING sum(g.committed) > 0;
    WITH gone AS (
        DELETE FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = ANY (p_ids)
        RETURNING d.queue_id, d.group_name
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, 6, g.queue_id, -count(*), g.group_name FROM gone g GROUP BY g.queue_id, g.group_name;
    DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = ANY (p_ids);
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = ANY (p_ids);
    DELETE FROM queen.expired_ranges e WHERE e.bucket = p_bucket AND e.partition_id = ANY (p_ids);
    PERFORM queen.forget_stream_partitions(p_bucket, p_ids);
    WITH gone AS (
        DELETE FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = ANY (p_ids)
        RETURNING p.queue_id, p.next_offset, p.first_offset, p.erased
    ), changes AS (
        SELECT 1::smallint AS kind, g.queue_id, -sum(g.next_offset) AS amount FROM gone g GROUP BY g.queue_id
        UNION ALL SELECT 2::smallint, g.queue_id, -sum(g.first_offset) FROM gone g GROUP BY g.queue_id
        UNION ALL SELECT 3::smallint, g.queue_id, -sum(g.erased) FROM gone g GROUP BY g.queue_id
        UNION ALL SELECT 4::smallint, g.queue_id, -count(*) FROM gone g GROUP BY g.queue_id
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, c.kind, c.queue_id, c.amount, '' FROM changes c WHERE c.amount <> 0;
END
$$;

-- Remove up to p_limit partitions of a deleted queue from one bucket, with all that hangs on them. Returns how many
-- went; 0 when there is nothing left.
CREATE OR REPLACE FUNCTION queen.purge(p_bucket integer, p_queue_id uuid, p_limit integer)
RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET plan_cache_mode = force_custom_plan SET jit = off
AS $$
DECLARE
    v_ids uuid[];
BEGIN
    DELETE FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id;
    DELETE FROM queen.queue_rooms r WHERE r.bucket = p_bucket AND r.queue_id = p_queue_id;
    DELETE FROM queen.queue_sweeps w WHERE w.bucket = p_bucket AND w.queue_id = p_queue_id;  -- 0035_sweeps.sql
    v_ids := ARRAY(
        SELECT p.partition_id FROM queen.partitions p WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id
        ORDER BY p.partition_id LIMIT p_limit FOR UPDATE);
    IF cardinality(v_ids) = 0 THEN
        DELETE FROM queen.counts t WHERE t.bucket = p_bucket AND t.queue_id = p_queue_id;
        DELETE FROM queen.count_changes t WHERE t.bucket = p_bucket AND t.queue_id = p_queue_id;
        RETURN 0;
    END IF;
    IF queen.drop_traces(p_bucket, v_ids, NULL, NULL, 1000) = 1000 THEN
        RETURN 1;  -- these partitions have more traces than one step removes
    END IF;
    DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = ANY (v_ids);
    DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket AND t.partition_id = ANY (v_ids);
    DELETE FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = ANY (v_ids);
    DELETE FROM queen.dead_letters d WHERE d.bucket = p_bucket AND d.partition_id = ANY (v_ids);
    DELETE FROM queen.expired_ranges e WHERE e.bucket = p_bucket AND e.partition_id = ANY (v_ids);
    PERFORM queen.forget_stream_partitions(p_bucket, v_ids);
    DELETE FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids);
    RETURN cardinality(v_ids);
END
$$;

-- Give back what never reached its consumer: the attempt is not counted. A lease ends; an autoAck is rewound if
-- nobody moved the cursor since. Returns the number of partitions that are ready again.
CREATE OR REPLACE FUNCTION queen.give_back(
    p_bucket integer,
    p_now timestamptz,
    p_partition_ids uuid[],         -- ascending
    p_groups text[],
    p_lease_ids uuid[],             -- NULL: autoAck
    p_firsts bigint[],
    p_ends bigint[]
) RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_count integer := 0;
BEGIN
    FOR i IN 1 .. cardinality(p_partition_ids) LOOP
        IF p_lease_ids[i] IS NULL THEN
            WITH rewound AS (
                UPDATE queen.cursors c SET committed = p_firsts[i], ready_at = v_now
                WHERE c.bucket = p_bucket AND c.partition_id = p_partition_ids[i] AND c.group_name = p_groups[i]
                    AND c.committed = p_ends[i] AND c.lease_id IS NULL
                RETURNING c.queue_id
            )
            INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
            SELECT p_bucket, 5, r.queue_id, p_firsts[i] - p_ends[i], p_groups[i] FROM rewound r;
        ELSE
            UPDATE queen.cursors c SET ready_at = v_now, attempt = greatest(c.attempt - 1, 0), lease_id = NULL,
                lease_expires_at = NULL, lease_first = NULL, lease_end = NULL, lease_epoch = NULL, acked = NULL
            WHERE c.bucket = p_bucket AND c.partition_id = p_partition_ids[i] AND c.group_name = p_groups[i]
                AND c.lease_id IS NOT DISTINCT FROM p_lease_ids[i];  -- which no index serves: by the key, then
        END IF;
        IF FOUND THEN
            v_count := v_count + 1;
        END IF;
    END LOOP;
    RETURN v_count;
END
$$;
