-- Consumer groups, after their registration: forget, start over, move.
--
-- One bucket a call. Lock order: queue_buckets, partitions by id, cursors by partition. A cursor becomes idle (ready_at
-- NULL) only under the lock of its partition. Joins are written as in 0002_push.sql, so that no plan begins at the wrong
-- end.

-- Remove the cursors of a group from one bucket of a queue, and its leases with them. The caller deletes the group's
-- row first, in the same transaction; a registration that comes meanwhile waits for the lock row.
CREATE OR REPLACE FUNCTION queen.forget_group_bucket(p_bucket integer, p_queue_id uuid, p_group text)
RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_ids uuid[];
    v_cursors integer;
BEGIN
    PERFORM FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id FOR UPDATE;
    v_ids := ARRAY(
        SELECT c.partition_id
        FROM (SELECT p.partition_id FROM queen.partitions p WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id
            ORDER BY p.partition_id OFFSET 0) p
        CROSS JOIN LATERAL (
            SELECT cu.partition_id FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.partition_id = p.partition_id AND cu.group_name = p_group LIMIT 1 FOR UPDATE
        ) c);
    WITH gone AS (
        DELETE FROM queen.cursors c
        WHERE c.bucket = p_bucket AND c.partition_id = ANY (v_ids) AND c.group_name = p_group
        RETURNING c.committed
    ), counted AS (
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, 5, p_queue_id, -sum(gone.committed), p_group FROM gone HAVING sum(gone.committed) > 0
    )
    SELECT count(*) INTO v_cursors FROM gone;
    RETURN v_cursors;
END
$$;

-- The offset after the last message of a partition that was created at or before p_at; p_first when there is none.
-- Times grow with offsets, so the search halves: some 15 looks in the largest partition.
CREATE OR REPLACE FUNCTION queen.offset_after(
    p_bucket integer, p_partition_id uuid, p_first bigint, p_next bigint, p_at timestamptz
) RETURNS bigint LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
DECLARE
    v_low bigint := p_first;        -- every message before it is old enough
    v_high bigint := p_next;        -- every message from it on is too young
    v_segment record;
BEGIN
    WHILE v_low < v_high LOOP
        SELECT s.base_offset, s.message_count, s.created_at INTO v_segment FROM queen.segments s
        WHERE s.bucket = p_bucket AND s.partition_id = p_partition_id
            AND s.base_offset <= v_low + (v_high - v_low) / 2
        ORDER BY s.base_offset DESC LIMIT 1;
        EXIT WHEN NOT FOUND;        -- the first segment begins later than p_first said
        IF v_segment.created_at <= p_at THEN
            v_low := v_segment.base_offset + v_segment.message_count;
        ELSE
            v_high := greatest(v_segment.base_offset, v_low);
        END IF;
    END LOOP;
    RETURN v_low;
END
$$;

-- Move the cursors of a group in one bucket of a queue, or the one of p_partition_id. Leases end, retries are forgotten.
-- p_to: start   where the group's subscription starts
--       end     behind the newest message
--       time    behind the last message created at or before p_at
--       offset  to p_offset, kept within what is stored
--       floor   up to the start of the subscription where that is ahead: after it floor_at is needed no more; leases stay
-- Returns the cursors that were moved to where p_to says (for `end`: those that were not there).
CREATE OR REPLACE FUNCTION queen.move_group_bucket(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_group text, p_partition_id uuid, p_to text,
    p_at timestamptz, p_offset bigint
) RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_group record;
    v_ids uuid[];
    v_cursors integer;
BEGIN
    SELECT g.start_at, g.floor_at INTO v_group FROM queen.consumer_groups g
    WHERE g.queue_id = p_queue_id AND g.name = p_group;

    -- with the lock row no partition is born that the group would then have at the wrong place
    PERFORM FROM queen.queue_buckets b WHERE b.bucket = p_bucket AND b.queue_id = p_queue_id FOR UPDATE;
    IF p_partition_id IS NOT NULL THEN
        v_ids := ARRAY[p_partition_id];
    ELSIF p_to = 'end' THEN  -- an idle cursor is there already
        v_ids := ARRAY(
            SELECT c.partition_id FROM queen.cursors c
            WHERE c.bucket = p_bucket AND c.queue_id = p_queue_id AND c.group_name = p_group AND c.ready_at IS NOT NULL);
    ELSE
        v_ids := ARRAY(
            SELECT p.partition_id FROM queen.partitions p WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id);
    END IF;
    v_ids := ARRAY(
        SELECT p.partition_id FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.partition_id = ANY (v_ids) AND p.queue_id = p_queue_id
        ORDER BY p.partition_id FOR SHARE);

    WITH held AS (
        SELECT given.partition_id, c.committed, p.first_offset, p.next_offset, p.oldest_at, p.last_created_at, p.erased
        FROM unnest(v_ids) AS given (partition_id)
        CROSS JOIN LATERAL (
            SELECT pa.* FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.partition_id = given.partition_id LIMIT 1
        ) p
        CROSS JOIN LATERAL (
            SELECT cu.committed FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.partition_id = given.partition_id AND cu.group_name = p_group
            LIMIT 1 FOR NO KEY UPDATE
        ) c
    ), aimed AS (
        SELECT held.*, greatest(held.first_offset, least(held.next_offset, CASE
            WHEN p_to = 'end' THEN held.next_offset
            WHEN p_to = 'offset' THEN p_offset
            WHEN moment.at IS NULL OR moment.at < held.oldest_at THEN held.first_offset
            WHEN moment.at >= held.last_created_at THEN held.next_offset
            ELSE queen.offset_after(p_bucket, held.partition_id, held.first_offset, held.next_offset, moment.at)
        END)) AS target
        FROM held CROSS JOIN LATERAL (
            -- a start is the first moment that is for the group, a time the last one that is not
            SELECT CASE p_to WHEN 'time' THEN p_at WHEN 'start' THEN v_group.start_at - interval '1 microsecond'
                WHEN 'floor' THEN v_group.floor_at - interval '1 microsecond' END AS at
        ) moment
    ), chosen AS (
        SELECT aimed.* FROM aimed WHERE p_to <> 'floor' OR aimed.committed < aimed.target
    ), moved AS (
        -- the rows are there, and locked: this finds each by its key
        INSERT INTO queen.cursors AS c (bucket, partition_id, group_name, queue_id, committed, ready_at, skips)
        SELECT p_bucket, chosen.partition_id, p_group, p_queue_id, chosen.target,
            CASE WHEN chosen.target < chosen.next_offset THEN v_now END,
            CASE WHEN chosen.erased > 0 THEN queen.erased_from(p_bucket, chosen.partition_id, chosen.target) END
        FROM chosen
        ON CONFLICT ON CONSTRAINT cursors_pkey DO UPDATE SET committed = excluded.committed,
            ready_at = excluded.ready_at, skips = excluded.skips, lease_id = NULL, lease_expires_at = NULL,
            lease_first = NULL, lease_end = NULL, lease_epoch = NULL, acked = NULL, completed_lease_id = NULL,
            retry_count = 0, attempt = 0
        RETURNING 1
    ), counted AS (
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, 5, p_queue_id, sum(chosen.target - chosen.committed), p_group FROM chosen
        HAVING sum(chosen.target - chosen.committed) <> 0
    )
    SELECT count(*) INTO v_cursors FROM moved;
    RETURN v_cursors;
END
$$;

-- How many offsets from p_committed on a cursor will skip.
CREATE OR REPLACE FUNCTION queen.skips_ahead(p_skips int8multirange, p_committed bigint)
RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_skips IS NULL THEN 0 ELSE (
        SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint
        FROM unnest(p_skips - int8multirange(int8range(NULL, p_committed))) r) END
$$;

-- How far behind a group is in its queue, from at most p_sample cursors that have something and as many of those
-- that are ready last (leased, delayed): `partitions` of them lag, `oldest_at` is the creation of the oldest message
-- that one of them has not consumed, `processing` are the messages under live leases, `leases` how many those are.
-- `whole`: nothing was left out.
CREATE OR REPLACE FUNCTION queen.group_lag(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_queue_ids uuid[], p_groups text[], p_sample integer
) RETURNS TABLE (
    place integer, partitions bigint, oldest_at timestamptz, processing bigint, leases bigint, whole boolean
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    RETURN QUERY
        SELECT given.place::integer, lag.partitions, lag.oldest_at, lag.processing, lag.leases, lag.seen < p_sample
        FROM unnest(p_queue_ids, p_groups) WITH ORDINALITY AS given (queue_id, group_name, place)
        CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE part.lags) AS partitions, min(first.created_at) AS oldest_at,
                coalesce(sum(part.leased) FILTER (WHERE part.live), 0)::bigint AS processing,
                count(*) FILTER (WHERE part.live) AS leases, count(*) AS seen
            FROM (
                (SELECT c.partition_id, c.committed, c.lease_expires_at, c.lease_epoch, c.lease_first, c.lease_end
                FROM queen.cursors c
                WHERE c.bucket = p_bucket AND c.queue_id = given.queue_id AND c.group_name = given.group_name
                    AND c.ready_at IS NOT NULL
                ORDER BY c.ready_at LIMIT p_sample)
                UNION
                (SELECT c.partition_id, c.committed, c.lease_expires_at, c.lease_epoch, c.lease_first, c.lease_end
                FROM queen.cursors c
                WHERE c.bucket = p_bucket AND c.queue_id = given.queue_id AND c.group_name = given.group_name
                    AND c.ready_at IS NOT NULL
                ORDER BY c.ready_at DESC LIMIT p_sample)
            ) c
            CROSS JOIN LATERAL (
                SELECT pa.next_offset, pa.first_offset FROM queen.partitions pa
                WHERE pa.bucket = p_bucket AND pa.partition_id = c.partition_id LIMIT 1
            ) p
            CROSS JOIN LATERAL (
                SELECT c.committed < p.next_offset AS lags,
                    coalesce(c.lease_expires_at > v_now AND c.lease_epoch = p_epoch, false) AS live,
                    c.lease_end - greatest(c.lease_first, c.committed) AS leased
            ) part
            LEFT JOIN LATERAL (
                SELECT s.created_at FROM queen.segments s
                WHERE part.lags AND s.bucket = p_bucket AND s.partition_id = c.partition_id
                    AND s.base_offset <= greatest(c.committed, p.first_offset)
                ORDER BY s.base_offset DESC LIMIT 1
            ) first ON true
        ) lag;
END
$$;

-- The partitions in which a group lags, those that have waited longest first, from at most p_limit cursors.
CREATE OR REPLACE FUNCTION queen.lagging_partitions(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_queue_ids uuid[], p_groups text[], p_limit integer
) RETURNS TABLE (
    place integer, partition_id uuid, partition_name text, committed bigint, ahead bigint, oldest_at timestamptz,
    lease_id uuid, lease_live boolean, consumed_at timestamptz
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    RETURN QUERY
        SELECT given.place::integer, c.partition_id, p.name, c.committed,
            p.next_offset - c.committed - queen.skips_ahead(c.skips, c.committed), first.created_at, c.lease_id,
            coalesce(c.lease_expires_at > v_now AND c.lease_epoch = p_epoch, false), c.consumed_at
        FROM unnest(p_queue_ids, p_groups) WITH ORDINALITY AS given (queue_id, group_name, place)
        CROSS JOIN LATERAL (
            SELECT cu.* FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.queue_id = given.queue_id AND cu.group_name = given.group_name
                AND cu.ready_at IS NOT NULL
            ORDER BY cu.ready_at LIMIT p_limit
        ) c
        CROSS JOIN LATERAL (
            SELECT pa.name, pa.next_offset, pa.first_offset FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.partition_id = c.partition_id LIMIT 1
        ) p
        CROSS JOIN LATERAL (
            SELECT s.created_at FROM queen.segments s
            WHERE s.bucket = p_bucket AND s.partition_id = c.partition_id
                AND s.base_offset <= greatest(c.committed, p.first_offset)
            ORDER BY s.base_offset DESC LIMIT 1
        ) first
        WHERE c.committed < p.next_offset;
END
$$;

-- Where a group stands in the partitions of a queue: at most p_limit of them, those with the oldest messages first.
CREATE OR REPLACE FUNCTION queen.group_positions(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_queue_id uuid, p_group text, p_limit integer
) RETURNS TABLE (
    partition_id uuid, partition_name text, committed bigint, ahead bigint, oldest_at timestamptz,
    lease_id uuid, lease_live boolean, consumed_at timestamptz
) LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    RETURN QUERY
        SELECT c.partition_id, p.name, c.committed,
            p.next_offset - c.committed - queen.skips_ahead(c.skips, c.committed), first.created_at, c.lease_id,
            coalesce(c.lease_expires_at > v_now AND c.lease_epoch = p_epoch, false), c.consumed_at
        FROM (
            SELECT pa.* FROM queen.partitions pa
            WHERE pa.bucket = p_bucket AND pa.queue_id = p_queue_id
            ORDER BY pa.oldest_at LIMIT p_limit
        ) p
        CROSS JOIN LATERAL (
            SELECT cu.* FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.partition_id = p.partition_id AND cu.group_name = p_group LIMIT 1
        ) c
        LEFT JOIN LATERAL (
            SELECT s.created_at FROM queen.segments s
            WHERE c.committed < p.next_offset AND s.bucket = p_bucket AND s.partition_id = c.partition_id
                AND s.base_offset <= greatest(c.committed, p.first_offset)
            ORDER BY s.base_offset DESC LIMIT 1
        ) first ON true;
END
$$;

-- Move what was counted since into counts. Nobody else folds the bucket at the same time: the caller holds its advisory
-- lock. What belongs to a queue that is gone is dropped. Returns how many rows were folded, and for the queues
-- concerned how many partitions came and went.
CREATE OR REPLACE FUNCTION queen.fold_counts(p_bucket integer, p_now timestamptz)
RETURNS TABLE (folded bigint, queue_names text[], created bigint[], deleted bigint[]) LANGUAGE plpgsql
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    WITH gone AS (
        DELETE FROM queen.count_changes c WHERE c.bucket = p_bucket
        RETURNING c.kind, c.queue_id, c.amount, c.group_name
    ), merged AS (
        INSERT INTO queen.counts AS t (bucket, queue_id, group_name, stored, removed, erased, partitions, consumed,
            dead_letters, stored_at)
        SELECT p_bucket, g.queue_id, g.group_name,
            coalesce(sum(g.amount) FILTER (WHERE g.kind = 1), 0), coalesce(sum(g.amount) FILTER (WHERE g.kind = 2), 0),
            coalesce(sum(g.amount) FILTER (WHERE g.kind = 3), 0), coalesce(sum(g.amount) FILTER (WHERE g.kind = 4), 0),
            coalesce(sum(g.amount) FILTER (WHERE g.kind = 5), 0), coalesce(sum(g.amount) FILTER (WHERE g.kind = 6), 0),
            CASE WHEN bool_or(g.kind = 1) THEN v_now END
        FROM gone g JOIN queen.queues q ON q.queue_id = g.queue_id
        GROUP BY g.queue_id, g.group_name
        ORDER BY g.queue_id, g.group_name
        ON CONFLICT ON CONSTRAINT counts_pkey DO UPDATE SET
            stored = t.stored + excluded.stored, removed = t.removed + excluded.removed,
            erased = t.erased + excluded.erased, partitions = t.partitions + excluded.partitions,
            consumed = t.consumed + excluded.consumed, dead_letters = t.dead_letters + excluded.dead_letters,
            stored_at = coalesce(excluded.stored_at, t.stored_at)
    ), births AS (
        SELECT q.name, coalesce(sum(g.amount) FILTER (WHERE g.amount > 0), 0)::bigint AS created,
            coalesce(-sum(g.amount) FILTER (WHERE g.amount < 0), 0)::bigint AS deleted
        FROM gone g JOIN queen.queues q ON q.queue_id = g.queue_id WHERE g.kind = 4 GROUP BY q.name
    )
    SELECT (SELECT count(*) FROM gone), array_agg(b.name), array_agg(b.created), array_agg(b.deleted)
    INTO folded, queue_names, created, deleted FROM births b;
    RETURN NEXT;
END
$$;
