-- What is too old: never delivered, then removed; where the queue asks for it, a dead letter first. And the pause before
-- a failed batch comes again.

-- Offsets first_offset <= o < end_offset that a group has passed because they had expired, and that are yet to become its
-- dead letters: the queue has deadLetterQueue. Written by whoever moves the cursor over them, in the same transaction;
-- a body can be opened by a worker only, which makes them dead letters soon after. Their segments stay until then.
CREATE TABLE queen.expired_ranges (
    bucket integer NOT NULL,
    partition_id uuid NOT NULL,
    group_name text NOT NULL,
    first_offset bigint NOT NULL,
    end_offset bigint NOT NULL,
    queue_id uuid NOT NULL,
    retry_count integer NOT NULL,
    reason text NOT NULL,
    expired_at timestamptz NOT NULL,
    CONSTRAINT expired_ranges_pkey PRIMARY KEY (bucket, partition_id, group_name, first_offset),
    CONSTRAINT expired_ranges_not_empty CHECK (first_offset < end_offset)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Which option it is that lets messages of a queue expire, in a sentence for a dead letter.
CREATE OR REPLACE FUNCTION queen.expiry_reason(p_queue_id uuid) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT format('Expired: %s of %s s is over', age.option, age.seconds)
    FROM queen.queues q CROSS JOIN LATERAL (VALUES
        (1, 'ttl', CASE WHEN q.ttl_enforced AND q.ttl_seconds > 0 THEN q.ttl_seconds END),
        (2, 'maxWaitTimeSeconds', CASE WHEN q.max_wait_time_seconds > 0 THEN q.max_wait_time_seconds END),
        (3, 'retentionSeconds', CASE WHEN q.retention_enabled AND q.retention_seconds > 0 THEN q.retention_seconds END)
    ) AS age (place, option, seconds)
    WHERE q.queue_id = p_queue_id AND age.seconds IS NOT NULL
    ORDER BY age.seconds, age.place LIMIT 1
$$;

-- Have the groups of a partition pass what has expired of it before p_until, and note it down for their dead letters. The
-- caller holds the partition's lock. A group under a live lease is left alone: what it holds it may still acknowledge. Where
-- no group ever was, the consumers without a group have missed it.
CREATE OR REPLACE FUNCTION queen.pass_expired(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_partition_id uuid, p_first bigint, p_until bigint,
    p_next bigint
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
DECLARE
    v_reason text := queen.expiry_reason(p_queue_id);
    c record;
    v_from bigint;
    v_floor timestamptz;
BEGIN
    INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed, ready_at)
    SELECT p_bucket, p_partition_id, '__QUEUE_MODE__', p_queue_id, 0, p_now
    WHERE NOT EXISTS (SELECT FROM queen.cursors o WHERE o.bucket = p_bucket AND o.partition_id = p_partition_id)
    ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING;
    FOR c IN
        SELECT cu.group_name, cu.committed, cu.retry_count, cu.lease_expires_at FROM queen.cursors cu
        WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_id AND cu.committed < p_until
        ORDER BY cu.group_name FOR NO KEY UPDATE
    LOOP
        CONTINUE WHEN c.lease_expires_at > p_now;
        v_from := greatest(c.committed, p_first);
        SELECT g.floor_at INTO v_floor FROM queen.consumer_groups g
        WHERE g.queue_id = p_queue_id AND g.name = c.group_name;
        IF v_floor IS NOT NULL THEN  -- what is from before its start was never for it
            v_from := queen.offset_after(p_bucket, p_partition_id, v_from, p_until, v_floor - interval '1 microsecond');
        END IF;
        IF v_from < p_until THEN
            INSERT INTO queen.expired_ranges AS e (bucket, partition_id, group_name, first_offset, end_offset, queue_id,
                retry_count, reason, expired_at)
            VALUES (p_bucket, p_partition_id, c.group_name, v_from, p_until, p_queue_id, c.retry_count,
                coalesce(v_reason, 'Expired'), p_now)
            ON CONFLICT ON CONSTRAINT expired_ranges_pkey DO UPDATE
            SET end_offset = greatest(e.end_offset, excluded.end_offset);
        END IF;
        UPDATE queen.cursors cu SET committed = p_until, skips = queen.skips_from(cu.skips, p_until), retry_count = 0,
            attempt = 0, lease_id = NULL, lease_expires_at = NULL, lease_first = NULL, lease_end = NULL,
            lease_epoch = NULL, acked = NULL, ready_at = CASE WHEN p_until < p_next THEN coalesce(cu.ready_at, p_now) END
        WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_id AND cu.group_name = c.group_name;
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        VALUES (p_bucket, 5, p_queue_id, p_until - c.committed, c.group_name);
    END LOOP;
END
$$;

-- When a partition became empty, as far as that was noticed since this migration; a push does not take it back, so that
-- only where oldest_at is NULL it says anything. Its index holds no partition that never was empty.
ALTER TABLE queen.partitions ADD COLUMN emptied_at timestamptz;

CREATE INDEX partitions_by_emptying ON queen.partitions (bucket, emptied_at) WHERE emptied_at IS NOT NULL;

-- One bounded step of retention in one bucket and queue: remove whole segments from the head of up to p_limit
-- partitions. Messages created before p_before go; those created before p_completed_before go when every group has
-- consumed them. What is under a live lease stays, and so does what is yet to become a dead letter. Returns the messages
-- removed, the partitions looked at, and where the next step goes on.
CREATE OR REPLACE FUNCTION queen.expire(
    p_bucket integer, p_now timestamptz, p_queue_id uuid, p_before timestamptz, p_completed_before timestamptz,
    p_after timestamptz, p_after_id uuid, p_limit integer
) RETURNS TABLE (removed bigint, partitions integer, last_oldest timestamptz, last_id uuid) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_keeps boolean := (SELECT q.dead_letter_queue FROM queen.queues q WHERE q.queue_id = p_queue_id);
    v_partition record;
    v_leased bigint;
    v_consumed bigint;
    v_until bigint;
    v_first bigint;
    v_oldest timestamptz;
    v_expired bigint;
    v_erased integer;
    v_erased_total bigint := 0;
BEGIN
    removed := 0; partitions := 0;
    FOR v_partition IN
        SELECT p.partition_id, p.first_offset, p.next_offset, p.oldest_at FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.queue_id = p_queue_id AND p.oldest_at >= p_after
            AND (p.oldest_at, p.partition_id) > (p_after, p_after_id)
            AND p.oldest_at < greatest(p_before, p_completed_before)
        ORDER BY p.oldest_at, p.partition_id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        partitions := partitions + 1;
        last_oldest := v_partition.oldest_at; last_id := v_partition.partition_id;
        IF v_keeps AND v_partition.oldest_at < p_before THEN
            SELECT s.base_offset INTO v_expired FROM queen.segments s
            WHERE s.bucket = p_bucket AND s.partition_id = v_partition.partition_id AND s.created_at >= p_before
            ORDER BY s.base_offset LIMIT 1;
            PERFORM queen.pass_expired(p_bucket, v_now, p_queue_id, v_partition.partition_id, v_partition.first_offset,
                coalesce(v_expired, v_partition.next_offset), v_partition.next_offset);
        END IF;
        SELECT min(c.lease_first) FILTER (WHERE c.lease_expires_at > v_now), min(c.committed)
        INTO v_leased, v_consumed
        FROM queen.cursors c WHERE c.bucket = p_bucket AND c.partition_id = v_partition.partition_id;
        SELECT least(v_leased, min(e.first_offset)) INTO v_leased FROM queen.expired_ranges e
        WHERE e.bucket = p_bucket AND e.partition_id = v_partition.partition_id;
        -- the end of the last segment that may go
        SELECT s.base_offset, s.created_at INTO v_first, v_oldest FROM queen.segments s
        WHERE s.bucket = p_bucket AND s.partition_id = v_partition.partition_id
            AND NOT (
                (s.created_at < coalesce(p_before, '-infinity')
                    OR (s.created_at < coalesce(p_completed_before, '-infinity')
                        AND s.base_offset + s.message_count <= coalesce(v_consumed, 0)))
                AND s.base_offset + s.message_count <= coalesce(v_leased, v_partition.next_offset)
            )
        ORDER BY s.base_offset LIMIT 1;
        v_until := CASE WHEN FOUND THEN v_first ELSE v_partition.next_offset END;
        IF v_until > v_partition.first_offset THEN
            WITH gone AS (
                DELETE FROM queen.segments s WHERE s.bucket = p_bucket AND s.partition_id = v_partition.partition_id
                    AND s.base_offset < v_until
                RETURNING s.erased
            )
            SELECT coalesce(sum(cardinality(gone.erased)), 0) INTO v_erased FROM gone;
            v_erased_total := v_erased_total + v_erased;
            DELETE FROM queen.transaction_ids t WHERE t.bucket = p_bucket
                AND t.partition_id = v_partition.partition_id AND t.message_offset < v_until;
            -- cursors never lag behind what is stored: the counts rely on it
            PERFORM queen.pass_removed(p_bucket, p_queue_id, v_partition.partition_id, v_until);
            UPDATE queen.partitions p SET first_offset = v_until, erased = p.erased - v_erased,
                oldest_at = CASE WHEN v_until < p.next_offset THEN v_oldest END,
                emptied_at = CASE WHEN v_until < p.next_offset THEN p.emptied_at ELSE v_now END
            WHERE p.bucket = p_bucket AND p.partition_id = v_partition.partition_id;
            removed := removed + v_until - v_partition.first_offset;
        END IF;
    END LOOP;
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT p_bucket, change.kind, p_queue_id, change.amount, ''
    FROM (VALUES (2::smallint, removed), (3::smallint, -v_erased_total)) AS change (kind, amount)
    WHERE change.amount <> 0;
    RETURN NEXT;
END
$$;

-- The next range of a bucket after the one given, locked; none that another worker is at.
CREATE OR REPLACE FUNCTION queen.next_expired(p_bucket integer, p_partition_id uuid, p_group text, p_first bigint)
RETURNS SETOF queen.expired_ranges LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off
AS $$
BEGIN
    RETURN QUERY
        SELECT e.* FROM queen.expired_ranges e
        WHERE e.bucket = p_bucket AND (e.partition_id, e.group_name, e.first_offset) > (p_partition_id, p_group, p_first)
        ORDER BY e.partition_id, e.group_name, e.first_offset LIMIT 1 FOR UPDATE SKIP LOCKED;
END
$$;

-- What of a range is dead letters by now; the range ends when that is all of it.
CREATE OR REPLACE FUNCTION queen.shorten_expired(
    p_bucket integer, p_partition_id uuid, p_group text, p_first bigint, p_done bigint
) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET jit = off
AS $$
BEGIN
    DELETE FROM queen.expired_ranges e
    WHERE e.bucket = p_bucket AND e.partition_id = p_partition_id AND e.group_name = p_group AND e.first_offset = p_first
        AND e.end_offset <= p_done;
    IF NOT FOUND THEN
        UPDATE queen.expired_ranges e SET first_offset = p_done
        WHERE e.bucket = p_bucket AND e.partition_id = p_partition_id AND e.group_name = p_group
            AND e.first_offset = p_first;
    END IF;
END
$$;

-- The pause before delivery number p_attempt + 1: the retry delay, doubled with every failure after the first, up to five
-- minutes or the delay itself where that is longer; and up to a fifth more, so that what failed together does not come
-- back together. p_random: from 0 to 1. Never less than the delay.
CREATE OR REPLACE FUNCTION queen.backoff(p_delay_ms integer, p_attempt integer, p_random double precision)
RETURNS interval LANGUAGE sql IMMUTABLE AS $$
    SELECT make_interval(secs => least(p_delay_ms * power(2, least(greatest(p_attempt, 1), 31) - 1),
        greatest(p_delay_ms, 300000)) * (1 + p_random / 5) / 1000)
$$;

-- Put off cursors whose lease has just been given back as failed, by the retry delay of their queues where one was asked
-- for. Part of the transaction of the ack. While the queue is being configured nothing is put off.
CREATE OR REPLACE FUNCTION queen.back_off(p_bucket integer, p_now timestamptz, p_partition_ids uuid[], p_groups text[])
RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_queue_id uuid;
    v_delay_ms integer;
    v_random double precision;
BEGIN
    FOR i IN 1 .. cardinality(p_partition_ids) LOOP
        SELECT p.queue_id INTO v_queue_id FROM queen.partitions p
        WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[i];
        SELECT q.retry_delay_ms INTO v_delay_ms FROM queen.queues q
        WHERE q.queue_id = v_queue_id AND q.retry_delay_enforced AND q.retry_delay_ms > 0;
        CONTINUE WHEN NOT FOUND OR NOT pg_try_advisory_xact_lock_shared(queen.delay_lock(p_bucket, v_queue_id));
        SELECT q.retry_delay_ms INTO v_delay_ms FROM queen.queues q
        WHERE q.queue_id = v_queue_id AND q.retry_delay_enforced;
        CONTINUE WHEN NOT FOUND;
        v_random := random();
        UPDATE queen.cursors c SET ready_at = v_now + queen.backoff(v_delay_ms, c.attempt, v_random)
        WHERE c.bucket = p_bucket AND c.partition_id = p_partition_ids[i] AND c.group_name = p_groups[i]
            AND c.lease_id IS NULL AND c.ready_at IS NOT NULL;
    END LOOP;
END
$$;

-- Extend every partition still leased under a lease. `renewed` of them now end at `expires_at`; `known` tells an
-- expired lease from one that was never or is no longer there. What comes after its end, comes as long after it as before.
CREATE OR REPLACE FUNCTION queen.extend_lease(
    p_bucket integer, p_now timestamptz, p_epoch integer, p_lease_id uuid, p_seconds integer
) RETURNS TABLE (renewed integer, expires_at timestamptz, known boolean) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off SET jit = off
AS $$
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
BEGIN
    WITH extended AS (
        UPDATE queen.cursors c
        SET lease_expires_at = greatest(c.lease_expires_at, v_now + make_interval(secs => p_seconds)),
            ready_at = greatest(c.lease_expires_at, v_now + make_interval(secs => p_seconds))
                + (c.ready_at - c.lease_expires_at)
        WHERE c.bucket = p_bucket AND c.lease_id = p_lease_id AND c.lease_expires_at > v_now
            AND c.lease_epoch = p_epoch
        RETURNING c.lease_expires_at
    )
    SELECT count(*)::integer, min(e.lease_expires_at) INTO renewed, expires_at FROM extended e;
    known := EXISTS (SELECT FROM queen.cursors c WHERE c.bucket = p_bucket AND c.lease_id = p_lease_id);
    RETURN NEXT;
END
$$;
