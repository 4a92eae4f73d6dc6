-- ack, as of 0061, but for acks of a partition that is deleted and made anew at that moment: they changed the new cursor,
-- to nothing at all, which it refused, and the client was answered 500.

-- Apply runs of acknowledgements. A run is consecutive offsets of one (partition, group) with one status and one
-- lease, in the order the consumer gave them; runs come ordered by (partition, group, request, place).
-- Statuses: 0 completed, 1 failed, 2 dlq, 3 retry.
-- Every lease is judged against the state before the request: after an item that ends the lease, the rest of the same
-- request stays valid, and its failures count once.
-- Answers one row a run: `lost` the lease is not live; `released` the lease ended with this run; `dead` its
-- messages go to the dead letter queue with `retry_count` (the caller writes them in this transaction);
-- `pending` something may be left to deliver now that the lease has ended: somebody who waits should look.
-- A cursor whose lease ended with its last message becomes idle, under the lock that every push takes or, while a push
-- holds it, not at all. The partition is locked after its cursor, against the order, and so never waited for.
CREATE OR REPLACE FUNCTION queen.ack(
    p_bucket integer,
    p_now timestamptz,
    p_epoch integer,
    p_straight boolean,             -- failed goes to the dead letter queue without counting (transactions)
    p_partition_ids uuid[],
    p_groups text[],
    p_requests integer[],
    p_lease_ids uuid[],             -- NULL: no lease check
    p_statuses smallint[],
    p_firsts bigint[],
    p_ends bigint[]
) RETURNS TABLE (run integer, lost boolean, released boolean, dead boolean, retry_count integer,
    pending boolean)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_material = off
SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := coalesce(p_now, clock_timestamp());
    v_total integer := cardinality(p_partition_ids);
    c record;                       -- the cursor, as this call changes it
    v_retry_limit integer;
    v_request integer;
    v_live_lease uuid;              -- at the start of the request
    v_retry_count integer;          -- at the start of the request
    v_failed boolean;               -- the request has counted its failure
    v_cap bigint;                   -- completed runs of the request do not pass this offset
    v_end bigint;
    v_moves boolean;
    v_live boolean;
    v_committed bigint;             -- of the cursor, before this call
    v_moved_queues uuid[] := '{}';
    v_moved_groups text[] := '{}';
    v_moved bigint[] := '{}';
    v_ended boolean;                -- this call ended the lease
BEGIN
    FOR i IN 1 .. v_total LOOP
        IF i = 1 OR p_partition_ids[i] <> p_partition_ids[i - 1] OR p_groups[i] <> p_groups[i - 1] THEN
            SELECT cu.queue_id, cu.committed, cu.ready_at, cu.lease_id, cu.lease_expires_at, cu.lease_first,
                cu.lease_end, cu.lease_epoch, cu.acked, cu.retry_count, cu.attempt, cu.completed_lease_id
            INTO c FROM queen.cursors cu
            WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_ids[i] AND cu.group_name = p_groups[i]
            FOR NO KEY UPDATE;
            IF NOT FOUND THEN
                -- an ack without a pop before: the group's cursor in this partition begins here
                INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed, ready_at)
                SELECT p_bucket, p.partition_id, p_groups[i], p.queue_id, 0, v_now
                FROM queen.partitions p WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[i]
                ON CONFLICT ON CONSTRAINT cursors_pkey DO NOTHING;
                SELECT cu.queue_id, cu.committed, cu.ready_at, cu.lease_id, cu.lease_expires_at, cu.lease_first,
                    cu.lease_end, cu.lease_epoch, cu.acked, cu.retry_count, cu.attempt, cu.completed_lease_id
                INTO c FROM queen.cursors cu
                WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_ids[i] AND cu.group_name = p_groups[i]
                FOR NO KEY UPDATE;
            END IF;
            SELECT q.retry_limit INTO v_retry_limit FROM queen.queues q WHERE q.queue_id = c.queue_id;
            v_committed := c.committed;
            v_ended := false;
            v_request := NULL;
        END IF;

        IF v_request IS DISTINCT FROM p_requests[i] THEN
            v_request := p_requests[i];
            v_live_lease := CASE WHEN c.lease_expires_at > v_now AND c.lease_epoch = p_epoch THEN c.lease_id END;
            v_retry_count := c.retry_count;
            v_failed := false;
            v_cap := NULL;
        END IF;

        run := i; lost := false; released := false; dead := false; retry_count := v_retry_count;

        IF p_lease_ids[i] IS NOT NULL AND p_lease_ids[i] IS DISTINCT FROM v_live_lease THEN
            -- a repeat of the ack that ended this lease gets the answer of the first
            lost := NOT (p_statuses[i] = 0 AND c.completed_lease_id IS NOT DISTINCT FROM p_lease_ids[i]
                AND p_ends[i] <= c.committed);
            released := NOT lost;
        ELSE
            v_live := c.lease_id IS NOT NULL AND c.lease_expires_at > v_now AND c.lease_epoch = p_epoch;
            v_moves := false;
            IF p_statuses[i] = 0 THEN
                v_moves := true;
            ELSIF p_statuses[i] = 3 THEN
                v_cap := least(v_cap, p_firsts[i]);
                released := true;
            ELSIF p_statuses[i] = 2 OR p_straight OR v_retry_count >= v_retry_limit THEN
                dead := true;
                v_moves := true;
            ELSE
                released := true;
                IF p_firsts[i] < c.committed THEN
                    -- passed already by a later ack: it cannot be delivered again, and is not to be lost
                    dead := true;
                ELSE
                    v_cap := least(v_cap, p_firsts[i]);
                    IF NOT v_failed THEN
                        v_failed := true;
                        c.retry_count := c.retry_count + 1;
                    END IF;
                END IF;
            END IF;

            IF v_moves THEN
                v_end := least(p_ends[i], v_cap);
                IF v_end > c.committed THEN
                    c.committed := v_end;
                    c.attempt := 0;
                END IF;
                IF v_live AND p_ends[i] > c.lease_first AND p_firsts[i] < c.lease_end THEN
                    c.acked := coalesce(c.acked, '{}'::int8multirange) + int8multirange(
                        int8range(greatest(p_firsts[i], c.lease_first), least(p_ends[i], c.lease_end)));
                    IF (SELECT sum(upper(r) - lower(r)) FROM unnest(c.acked) r) >= c.lease_end - c.lease_first THEN
                        released := true;
                        c.retry_count := 0;
                        c.completed_lease_id := c.lease_id;
                    END IF;
                END IF;
            END IF;

            IF released AND c.lease_id IS NOT NULL THEN
                c.lease_id := NULL; c.lease_expires_at := NULL; c.lease_first := NULL; c.lease_end := NULL;
                c.lease_epoch := NULL; c.acked := NULL;
                c.ready_at := v_now;
                v_ended := true;
            END IF;
        END IF;

        pending := false;
        IF i = v_total OR p_partition_ids[i] <> p_partition_ids[i + 1] OR p_groups[i] <> p_groups[i + 1] THEN
            IF v_ended THEN
                PERFORM FROM queen.partitions p
                WHERE p.bucket = p_bucket AND p.partition_id = p_partition_ids[i] AND p.next_offset <= c.committed
                ORDER BY p.partition_id FOR NO KEY UPDATE SKIP LOCKED;
                pending := NOT FOUND;
                c.ready_at := CASE WHEN pending THEN c.ready_at END;
            END IF;
            -- none: the partition was gone; one that has come since has nothing to do with these acks
            IF c.committed IS NOT NULL THEN
                UPDATE queen.cursors cu SET committed = c.committed, ready_at = c.ready_at, lease_id = c.lease_id,
                    lease_expires_at = c.lease_expires_at, lease_first = c.lease_first, lease_end = c.lease_end,
                    lease_epoch = c.lease_epoch, acked = c.acked, retry_count = c.retry_count, attempt = c.attempt,
                    completed_lease_id = c.completed_lease_id, consumed_at = v_now
                WHERE cu.bucket = p_bucket AND cu.partition_id = p_partition_ids[i] AND cu.group_name = p_groups[i];
            END IF;
            IF c.committed <> v_committed THEN
                v_moved_queues := v_moved_queues || c.queue_id;
                v_moved_groups := v_moved_groups || p_groups[i];
                v_moved := v_moved || c.committed - v_committed;
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
    IF cardinality(v_moved) > 0 THEN
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT p_bucket, 5, m.queue_id, sum(m.moved), m.group_name
        FROM unnest(v_moved_queues, v_moved_groups, v_moved) AS m (queue_id, group_name, moved)
        GROUP BY m.queue_id, m.group_name;
    END IF;
END
$$;
